//! The static source at work: manifests are read again as they change, and the control task is told.
//!
//! How changes are noticed is `watch`; what is read is `manifest`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::control::Message;
use crate::manifest::Source;
use crate::manifest_file::Changed;
use crate::model::Event;
use crate::plan::Problem;
use crate::reading::Reading;
use crate::status::SourceStatus;
use crate::watch::{Interest, Settling, Sign, Watch};

/// How often all files are read to see whether they changed, where the kernel did not tell.
pub const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Reads the inputs, and again each time that they change or `reload` says so, until `cancel`.
///
/// Sends the objects whenever they changed, what is wrong whenever that changed, and `Synced` behind the
/// first of both. A change is sent about 5 ms after its writer closed the file.
pub async fn run(source: Source, messages: mpsc::Sender<Message>, reload: Arc<Notify>, cancel: CancellationToken) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = follow(source, messages, &reload) => {}
    }
}

/// Ends when nobody listens any more.
async fn follow(source: Source, messages: mpsc::Sender<Message>, reload: &Notify) {
    let mut watch = Watch::start();
    watch.look_at(source.interest());
    let mut reader = match Reader::start(source) {
        Ok(reader) => reader,
        Err(error) => return tracing::error!(%error, "cannot start a thread to read manifests"),
    };
    let mut report = Report { messages, status: SourceStatus::default(), problems: Vec::new(), synced: false };
    let mut settling = Settling::default();
    let mut poll = interval_at(Instant::now() + POLL_INTERVAL, POLL_INTERVAL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let Some((refreshed, interest)) = reader.refresh(settling.clone()).await else { return };
        if watch.look_at(interest) {
            // Something may have changed before it was watched.
            settling.note(PathBuf::new(), Sign::Changed, Instant::now());
        }
        if report.send(refreshed, watch.problem()).await.is_err() {
            return;
        }
        loop {
            let due = settling.due();
            tokio::select! {
                biased;
                () = reload.notified() => break,
                signs = watch.next() => {
                    signs.into_iter().for_each(|(path, sign)| settling.note(path, sign, Instant::now()));
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    settling.settle(Instant::now());
                    break;
                }
                _ = poll.tick() => break,
            }
        }
    }
}

/// What changed, and all that is so now if anything did.
type Refreshed = Option<(Changed, Reading)>;

/// The thread that owns the source: a file may be large, and standard input slow, even at the end of the process.
struct Reader {
    ask: mpsc::Sender<Settling>,
    answers: mpsc::Receiver<(Refreshed, Interest)>,
}

impl Reader {
    fn start(mut source: Source) -> io::Result<Self> {
        let (ask, mut asked) = mpsc::channel::<Settling>(1);
        let (answer, answers) = mpsc::channel(1);
        let read = move || {
            let mut first = true;
            while let Some(settling) = asked.blocking_recv() {
                let mut changed = source.refresh(&settling);
                changed.objects |= first;
                first = false;
                let refreshed = (changed != Changed::default()).then(|| (changed, source.reading()));
                if answer.blocking_send((refreshed, source.interest())).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("manifests".to_owned()).spawn(read)?;
        Ok(Self { ask, answers })
    }

    async fn refresh(&mut self, settling: Settling) -> Option<(Refreshed, Interest)> {
        self.ask.send(settling).await.ok()?;
        let answer = self.answers.recv().await;
        if answer.is_none() {
            tracing::error!("the reader of manifests is gone; changes are no longer seen, restart the relay");
        }
        answer
    }
}

/// What was said to the control task.
struct Report {
    messages: mpsc::Sender<Message>,
    status: SourceStatus,
    problems: Vec<Problem>,
    synced: bool,
}

impl Report {
    /// Says what is new.
    async fn send(
        &mut self,
        refreshed: Refreshed,
        unwatched: Option<Problem>,
    ) -> Result<(), mpsc::error::SendError<Message>> {
        let Some((changed, Reading { objects, mut problems, failed, rejections, .. })) = refreshed else {
            return Ok(());
        };
        problems.extend(unwatched);
        let mut status = self.status.clone();
        status.kind = "static".into();
        status.last_reload_successful = failed.is_empty();
        status.config_revision += u64::from(changed.objects);
        status.rejections = rejections;
        let revision = status.config_revision;
        if changed.objects {
            let (services, slices) = (objects.services.len(), objects.slices.len());
            tracing::info!(revision, services, slices, "manifests taken");
            self.messages.send(Message::Event(Event::Replace(objects))).await?;
        }
        if status != self.status || problems != self.problems {
            (self.status, self.problems) = (status.clone(), problems.clone());
            self.messages.send(Message::Source { status, problems }).await?;
        }
        if !self.synced {
            self.synced = true;
            self.messages.send(Message::Synced).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;
    use crate::manifest::tests::{folder, names, put, service, source};

    /// Below the poll: what is seen in time was seen by the watch.
    const DEADLINE: Duration = Duration::from_secs(4);

    /// A source that runs, and what it says.
    struct Running {
        messages: mpsc::Receiver<Message>,
        reload: Arc<Notify>,
        cancel: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Running {
        async fn start(path: PathBuf) -> Self {
            let (sender, messages) = mpsc::channel(16);
            let (reload, cancel) = (Arc::new(Notify::new()), CancellationToken::new());
            let task = tokio::spawn(run(source(&[path]), sender, reload.clone(), cancel.clone()));
            let mut running = Self { messages, reload, cancel, task };
            while !matches!(running.next().await, Message::Synced) {}
            running
        }

        async fn next(&mut self) -> Message {
            let message = timeout(DEADLINE, self.messages.recv()).await;
            message.expect("a message in time").expect("a source that runs")
        }

        /// The names of the next objects.
        async fn services(&mut self) -> Vec<String> {
            loop {
                if let Message::Event(Event::Replace(objects)) = self.next().await {
                    return names(&objects).into_iter().map(str::to_owned).collect();
                }
            }
        }

        /// The next state of the source; no objects may come before it.
        async fn status(&mut self) -> (SourceStatus, Vec<Problem>) {
            match self.next().await {
                Message::Source { status, problems } => (status, problems),
                other => panic!("not a state of the source: {other:?}"),
            }
        }

        async fn end(self) {
            self.cancel.cancel();
            timeout(DEADLINE, self.task).await.expect("an end in time").expect("an end without panic");
        }
    }

    #[tokio::test]
    async fn given_a_source_when_started_then_objects_state_and_synced_come_in_this_order() {
        let folder = folder(&[("a.yaml", &service("a")), ("b.yaml", "kind: [\n")]);
        let (sender, mut messages) = mpsc::channel(16);
        let source = source(&[folder.path().into()]);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(run(source, sender, Arc::default(), cancel.clone()));

        let first = messages.recv().await.expect("objects");
        let second = messages.recv().await.expect("a state");
        let third = messages.recv().await.expect("synced");

        assert!(matches!(first, Message::Event(Event::Replace(objects)) if names(&objects) == ["a"]));
        let Message::Source { status, problems } = second else { panic!("{second:?}") };
        assert_eq!((&*status.kind, status.last_reload_successful, status.config_revision), ("static", false, 1));
        assert_eq!(problems.len(), 1);
        assert!(matches!(third, Message::Synced));
        cancel.cancel();
        task.await.expect("an end without panic");
    }

    #[tokio::test]
    async fn t228_given_a_file_written_in_place_when_followed_then_it_is_noticed() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().join("a.yaml")).await;

        put(&folder, "a.yaml", &service("b"));

        assert_eq!(running.services().await, ["b"]);
        running.end().await;
    }

    #[tokio::test]
    async fn t228_given_a_file_replaced_by_rename_when_followed_then_it_is_noticed() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().join("a.yaml")).await;

        for name in ["b", "c"] {
            put(&folder, "a.yaml.tmp", &service(name));
            fs::rename(folder.path().join("a.yaml.tmp"), folder.path().join("a.yaml")).expect("a rename");

            assert_eq!(running.services().await, [name]);
        }
        running.end().await;
    }

    #[tokio::test]
    async fn t228_given_a_broken_write_when_followed_then_only_the_state_tells_and_mending_is_noticed() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        put(&folder, "a.yaml", "kind: [\n");
        let (broken, problems) = running.status().await;
        put(&folder, "a.yaml", &service("b"));
        let services = running.services().await;
        let (mended, none) = running.status().await;

        assert_eq!((broken.last_reload_successful, broken.config_revision), (false, 1));
        assert!(problems[0].line.is_some());
        assert_eq!(services, ["b"]);
        assert_eq!((mended.last_reload_successful, mended.config_revision), (true, 2));
        assert_eq!(none, []);
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_file_written_in_parts_when_followed_then_only_the_whole_is_taken() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        let mut file = fs::File::create(folder.path().join("a.yaml")).expect("a file");
        for part in [service("b"), service("c")] {
            file.write_all(part.as_bytes()).expect("a part");
        }
        drop(file);

        assert_eq!(running.services().await, ["b", "c"]);
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_mounted_config_map_when_its_link_is_swapped_then_it_is_noticed() {
        let folder = folder(&[]);
        let version = |name: &str, text: &str| {
            fs::create_dir(folder.path().join(name)).expect("a folder");
            fs::write(folder.path().join(name).join("a.yaml"), text).expect("a file");
        };
        version("..1", &service("a"));
        symlink("..1", folder.path().join("..data")).expect("a link");
        symlink("..data/a.yaml", folder.path().join("a.yaml")).expect("a link");
        let mut of_folder = Running::start(folder.path().into()).await;
        let mut of_file = Running::start(folder.path().join("a.yaml")).await;

        for (old, new, name) in [("..1", "..2", "b"), ("..2", "..3", "c")] {
            version(new, &service(name));
            symlink(new, folder.path().join("..data_tmp")).expect("a link");
            fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).expect("a rename");
            fs::remove_dir_all(folder.path().join(old)).expect("a folder");

            assert_eq!(of_folder.services().await, [name]);
            assert_eq!(of_file.services().await, [name]);
        }
        of_folder.end().await;
        of_file.end().await;
    }

    #[tokio::test]
    async fn t228_given_files_that_come_and_go_when_followed_then_the_folder_counts() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        put(&folder, "b.yaml", &service("b"));
        let more = running.services().await;
        fs::remove_file(folder.path().join("a.yaml")).expect("a file");
        let less = running.services().await;

        assert_eq!((more, less), (vec!["a".to_owned(), "b".to_owned()], vec!["b".to_owned()]));
        running.end().await;
    }

    #[tokio::test]
    async fn t228_given_a_named_file_when_removed_and_back_then_the_state_tells_both() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().join("a.yaml")).await;

        fs::remove_file(folder.path().join("a.yaml")).expect("a file");
        let (gone, problems) = running.status().await;
        put(&folder, "a.yaml", &service("a"));
        let (back, none) = running.status().await;

        assert!(!gone.last_reload_successful && problems[0].message.starts_with("no such file"));
        assert!(back.last_reload_successful && none.is_empty());
        assert_eq!(back.config_revision, 1);
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_folder_that_is_replaced_when_followed_then_the_new_one_is_watched() {
        let outer = folder(&[]);
        let inner = outer.path().join("inner");
        let fill = |name: &str| {
            fs::create_dir(&inner).expect("a folder");
            fs::write(inner.join("a.yaml"), service(name)).expect("a file");
        };
        fill("a");
        let mut running = Running::start(inner.clone()).await;

        fs::remove_dir_all(&inner).expect("a folder");
        fill("b");
        let replaced = running.services().await;
        fs::write(inner.join("a.yaml"), service("c")).expect("a file");
        let written = running.services().await;

        assert_eq!((replaced.last(), written.last()), (Some(&"b".to_owned()), Some(&"c".to_owned())));
        running.end().await;
    }

    #[tokio::test]
    async fn given_unchanged_content_when_reloaded_then_nothing_is_said() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let mut running = Running::start(folder.path().into()).await;

        put(&folder, "a.yaml", &service("a"));
        running.reload.notify_one();
        put(&folder, "b.yaml", &service("b"));

        assert!(matches!(running.next().await, Message::Event(_)), "the next word is about b.yaml");
        running.end().await;
    }

    #[tokio::test]
    async fn given_a_reload_when_nobody_saw_the_change_then_it_is_read() {
        let folder = folder(&[("a.yaml", &service("a"))]);
        let elsewhere = tempfile::tempdir().expect("a folder");
        let linked = elsewhere.path().join("a.yaml");
        fs::hard_link(folder.path().join("a.yaml"), &linked).expect("a link");
        let mut running = Running::start(folder.path().into()).await;

        // Written through another name: the watched folder hears nothing.
        fs::write(&linked, service("b")).expect("a file");
        running.reload.notify_one();

        assert_eq!(running.services().await, ["b"]);
        running.end().await;
    }
}
