//! The access log: a line for each connection and flow that has ended, written by one thread.
//!
//! What the data plane tells of an end is `serve::access`, how a line looks is `access_line`. Here is the file: opened
//! at the start, opened anew when somebody has moved it away (logrotate), tried again while it cannot be written.
//! Meanwhile the queue fills, and what does not fit is dropped and counted: traffic never waits for a disk, and nobody
//! waits for whoever reads a pipe.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::{self, Thread};
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

pub use crate::access_line::AccessFormat;
use crate::access_line::encode;
use crate::serve::access::{AccessRecord, AccessTap};
use crate::stats::PROCESS;

/// Records that wait for the writer: what ends within [`REST`] at 400,000 a second, in some 2 MB.
const QUEUE: usize = 8_192;
/// Encoded lines that are gathered for one write.
const BATCH_BYTES: usize = 64 * 1024;
/// The writer's pause between two looks at a queue that is in use: it is woken 50 times a second at most, and writes
/// many lines at once.
const REST: Duration = Duration::from_millis(20);
/// The pause before what could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How long a full pipe may stay so before that is a failure; its reader may be busy.
const PIPE_PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// How long the last lines may take at the end of the process: whoever reads them through a pipe may have stopped.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Clients' addresses are not for everybody on this machine.
const MODE: u32 = 0o640;

/// What to write, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLogOptions {
    /// Where lines go. From `--access-log`.
    pub output: AccessOutput,
    /// Their form. From `--access-log-format`, default JSON.
    pub format: AccessFormat,
    /// One connection or flow in so many has a line. From `--access-log-sample`, default 1.
    pub sample: NonZeroU32,
}

/// Where the lines of an access log go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessOutput {
    /// Standard output.
    Stdout,
    /// To the end of a file; made where there is none, readable for owner and group.
    File(PathBuf),
}

/// The access log cannot be begun.
#[derive(Debug, thiserror::Error)]
#[error("access log {output}: cannot be opened")]
pub struct AccessLogError {
    /// Where lines were to go.
    pub output: AccessOutput,
    /// What the kernel said.
    pub source: io::Error,
}

/// A running access log. Owned by whoever runs the relay; dropped, it ends by itself, soon.
#[derive(Debug)]
pub struct AccessLog {
    tap: AccessTap,
    orders: Arc<Orders>,
    writer: Thread,
    /// Resolves when the last line is written.
    ended: oneshot::Receiver<()>,
}

/// What the writer is to do besides writing.
#[derive(Debug, Default)]
struct Orders {
    reopen: AtomicBool,
    end: AtomicBool,
}

impl Orders {
    fn are_there(&self) -> bool {
        self.reopen.load(Ordering::Acquire) || self.end.load(Ordering::Acquire)
    }
}

impl AccessLog {
    /// Opens the file and starts the writer.
    ///
    /// # Errors
    /// The file cannot be opened for writing, or there is no thread left.
    pub fn start(options: &AccessLogOptions) -> Result<Self, AccessLogError> {
        let failed = |source| AccessLogError { output: options.output.clone(), source };
        let file = options.output.open().map_err(failed)?;
        let (tap, queue) = AccessTap::new(QUEUE, options.sample, rand::random());
        let (orders, (done, ended)) = (Arc::new(Orders::default()), oneshot::channel::<()>());
        let writer = Writer {
            output: options.output.clone(),
            format: options.format,
            file,
            queue,
            orders: Arc::clone(&orders),
            pending: Pending::default(),
            failing: false,
        };
        let thread = thread::Builder::new().name("access-log".to_owned()).spawn(move || {
            writer.run();
            drop(done);
        });
        let writer = thread.map_err(failed)?.thread().clone();
        Ok(Self { tap, orders, writer, ended })
    }

    /// Where a relay tells of its ends.
    pub fn tap(&self) -> AccessTap {
        self.tap.clone()
    }

    /// Opens the file anew: what ends from now on goes to whatever has its name. Where that fails, the old one goes on.
    pub fn reopen(&self) {
        self.order(&self.orders.reopen);
    }

    /// Writes what was told so far, and ends; gives up after two seconds.
    pub async fn end(mut self) {
        self.order(&self.orders.end);
        if timeout(END_PATIENCE, &mut self.ended).await.is_err() {
            warn!("the access log is not written to its end: nobody takes the last lines");
        }
    }

    /// The writer waits for a record, or for another try: either is cut short.
    fn order(&self, order: &AtomicBool) {
        order.store(true, Ordering::Release); // Pairs with the loads in `Orders` and `Writer::run`.
        self.tap.nudge();
        self.writer.unpark();
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.order(&self.orders.end);
    }
}

impl AccessOutput {
    fn open(&self) -> io::Result<File> {
        match self {
            Self::Stdout => Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
            Self::File(path) => open(path),
        }
    }
}

/// Waits for nobody. A named pipe is opened for both ways, as the kernel then takes lines before there is a reader, and
/// while it is replaced; for one way alone it would wait for a reader, or refuse.
fn open(path: &Path) -> io::Result<File> {
    let is_pipe = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    OpenOptions::new().read(is_pipe).append(true).create(true).mode(MODE).custom_flags(libc::O_NONBLOCK).open(path)
}

impl From<PathBuf> for AccessOutput {
    /// `-` is standard output.
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == "-" { Self::Stdout } else { Self::File(path) }
    }
}

impl fmt::Display for AccessOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("on standard output"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Writes the lines. Owned by its thread.
struct Writer {
    output: AccessOutput,
    format: AccessFormat,
    file: File,
    queue: Receiver<Option<AccessRecord>>,
    orders: Arc<Orders>,
    pending: Pending,
    /// True from a write that failed to the next that does not.
    failing: bool,
}

impl Writer {
    fn run(mut self) {
        loop {
            self.wait();
            // Before the queue is emptied: what was told before the order is written.
            let ends = self.orders.end.load(Ordering::Acquire);
            if self.orders.reopen.swap(false, Ordering::Acquire) {
                self.reopen();
            }
            let outcome = self.write();
            self.note(outcome);
            if ends {
                return self.leave();
            }
            if !self.failing {
                thread::sleep(REST);
            }
        }
    }

    /// Waits for something to be done. Orders are looked at before: what is to wake for them may have been taken with
    /// the records of the last turn.
    fn wait(&mut self) {
        if self.orders.are_there() {
            return;
        }
        if self.failing {
            return thread::park_timeout(RETRY_AFTER);
        }
        match self.queue.recv() {
            Ok(entry) => self.take(entry),
            Err(_) => self.orders.end.store(true, Ordering::Release), // All who could tell of anything are gone.
        }
    }

    /// Writes what waits: as much as the queue holds, so that orders are looked at now and then however much comes.
    fn write(&mut self) -> io::Result<()> {
        if self.failing {
            self.flush()?; // Nothing more is taken before this is gone.
        }
        for _ in 0..QUEUE {
            let Ok(entry) = self.queue.try_recv() else { break };
            self.take(entry);
            if self.pending.bytes.len() >= BATCH_BYTES {
                self.flush()?;
            }
        }
        self.flush()
    }

    /// Writes what is encoded, however slowly a pipe is read; one that nobody reads for a time is a failure.
    fn flush(&mut self) -> io::Result<()> {
        loop {
            match self.pending.write_to(&mut self.file) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.has_room_soon() => {}
                outcome => return outcome,
            }
        }
    }

    fn has_room_soon(&self) -> bool {
        let mut pipe = [PollFd::new(&self.file, PollFlags::OUT)];
        poll(&mut pipe, Some(&PIPE_PATIENCE)).is_ok_and(|ready| ready > 0)
    }

    fn take(&mut self, entry: Option<AccessRecord>) {
        if let Some(record) = entry {
            let at = SystemTime::now() - record.at.elapsed();
            encode(&record, at, self.format, &mut self.pending.bytes);
        }
    }

    /// Tells the first failure of a row, and its end.
    fn note(&mut self, outcome: io::Result<()>) {
        match &outcome {
            Err(error) if !self.failing => {
                let output = &self.output;
                warn!(%output, %error, "the access log cannot be written: tried each second, what is too much is dropped");
            }
            Ok(()) if self.failing => {
                let dropped = PROCESS.access_log_dropped.get();
                info!(output = %self.output, dropped, "the access log is written again");
            }
            _ => {}
        }
        self.failing = outcome.is_err();
    }

    /// Standard output stays what it is.
    fn reopen(&mut self) {
        if self.output == AccessOutput::Stdout {
            return;
        }
        match self.output.open() {
            Ok(file) => {
                self.file = file;
                if self.pending.skip_torn_line() {
                    PROCESS.access_log_dropped.increment();
                }
                info!(output = %self.output, "the access log is opened anew");
            }
            Err(error) => {
                warn!(output = %self.output, %error, "the access log cannot be opened anew: the file of before goes on");
            }
        }
    }

    /// Counts what could not be written to the last.
    fn leave(self) {
        let waiting = if self.failing { self.queue.try_iter().flatten().count() } else { 0 };
        let lost = self.pending.line_count() + waiting;
        if lost > 0 {
            PROCESS.access_log_dropped.add(lost as u64);
            warn!(output = %self.output, lost, "the last lines of the access log could not be written");
        }
    }
}

/// Lines that are not written yet, or in part.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// So many of them are written.
    written: usize,
}

impl Pending {
    /// Writes all. After an error it can be called again: no byte is written twice, none is left out.
    fn write_to(&mut self, file: &mut impl Write) -> io::Result<()> {
        while self.written < self.bytes.len() {
            match file.write(&self.bytes[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.written = 0;
        Ok(())
    }

    /// Leaves out the rest of a line that an earlier file has the begin of. True where there was one.
    fn skip_torn_line(&mut self) -> bool {
        let is_torn = self.written > 0 && self.bytes[self.written - 1] != b'\n';
        if is_torn {
            let rest = self.bytes[self.written..].iter().position(|byte| *byte == b'\n');
            self.written = rest.map_or(self.bytes.len(), |end| self.written + end + 1);
        }
        is_torn
    }

    /// Lines that are not, or not wholly, written.
    fn line_count(&self) -> usize {
        self.bytes[self.written..].iter().filter(|byte| **byte == b'\n').count()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::time::Instant;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::serve::access::tests::{BACKEND, draft};
    use crate::stats::CloseReason;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn log(path: &Path) -> AccessLog {
        let output = AccessOutput::from(path.to_owned());
        let options = AccessLogOptions { output, format: AccessFormat::Json, sample: NonZeroU32::MIN };
        AccessLog::start(&options).expect("a file that can be written")
    }

    fn tell(log: &AccessLog) {
        draft(&log.tap).closed(BACKEND, CloseReason::Finished);
    }

    fn line_count(path: &Path) -> usize {
        fs::read_to_string(path).map_or(0, |text| text.lines().count())
    }

    fn until(what: &str, condition: impl Fn() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A file that takes so many bytes, and then says each time that the disk is full.
    struct Small {
        room: usize,
        taken: Vec<u8>,
    }

    impl Write for Small {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room);
            if count == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= count;
            self.taken.extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn given_a_disk_that_fills_within_a_line_when_there_is_room_again_then_the_line_is_whole() {
        let mut pending = Pending { bytes: b"first\nsecond\n".to_vec(), written: 0 };
        let mut file = Small { room: 8, taken: vec![] };

        assert!(pending.write_to(&mut file).is_err());
        assert_eq!(pending.line_count(), 1);
        file.room = 100;
        pending.write_to(&mut file).expect("room");

        assert_eq!(file.taken, b"first\nsecond\n");
        assert_eq!((pending.bytes.len(), pending.written), (0, 0));
    }

    #[test]
    fn given_a_line_that_is_written_in_part_when_there_is_another_file_then_it_begins_with_a_whole_line() {
        let mut pending = Pending { bytes: b"first\nsecond\nthird\n".to_vec(), written: 8 };

        assert!(pending.skip_torn_line());

        let mut file = Small { room: 100, taken: vec![] };
        pending.write_to(&mut file).expect("room");
        assert_eq!(file.taken, b"third\n");
        for written in [0, 6] {
            let mut pending = Pending { bytes: b"first\nsecond\n".to_vec(), written };
            assert!(!pending.skip_torn_line(), "nothing is torn at {written}");
            assert_eq!(pending.written, written);
        }
    }

    #[tokio::test]
    async fn given_ends_when_the_log_is_ended_then_each_has_its_line_and_others_cannot_read_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("access.log");
        let log = log(&path);

        (0..100).for_each(|_| tell(&log));
        log.end().await;

        assert_eq!(line_count(&path), 100);
        assert_eq!(fs::metadata(&path).expect("a file").permissions().mode() & 0o007, 0);
    }

    #[tokio::test]
    async fn given_a_file_that_was_moved_away_when_it_is_opened_anew_then_lines_go_to_one_of_its_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, moved) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
        let log = log(&path);
        tell(&log);
        until("the first line", || line_count(&path) == 1);

        fs::rename(&path, &moved).expect("a file");
        log.reopen();
        until("another file", || path.exists());
        tell(&log);
        log.end().await;

        assert_eq!((line_count(&moved), line_count(&path)), (1, 1));
    }

    #[tokio::test]
    async fn given_a_folder_that_is_gone_when_the_file_is_opened_anew_then_the_one_of_before_goes_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let (logs, moved) = (folder.path().join("logs"), folder.path().join("old"));
        fs::create_dir(&logs).expect("a folder");
        let log = log(&logs.join("access.log"));

        fs::rename(&logs, &moved).expect("a folder");
        log.reopen();
        tell(&log);
        log.end().await;

        assert_eq!(line_count(&moved.join("access.log")), 1);
    }

    #[tokio::test]
    async fn given_a_full_disk_when_more_ends_than_fits_then_it_is_counted_and_the_rest_is_written_later() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("access.log");
        symlink("/dev/full", &path).expect("a link");
        let log = log(&path);
        let before = PROCESS.access_log_dropped.get();

        (0..3 * QUEUE).for_each(|_| tell(&log));
        let dropped = PROCESS.access_log_dropped.get() - before;
        fs::remove_file(&path).expect("a link");
        log.reopen();
        until("another file", || path.exists());
        log.end().await;

        assert!(dropped > 0, "a full queue was not noticed");
        assert!(line_count(&path) >= QUEUE, "what the queue held was lost");
        let text = fs::read_to_string(&path).expect("a file");
        assert!(text.lines().all(|line| line.starts_with('{') && line.ends_with('}')), "torn lines");
    }

    /// A named pipe that nobody reads.
    fn pipe(folder: &Path) -> PathBuf {
        let path = folder.join("access.pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a folder of the test's own");
        path
    }

    #[tokio::test]
    async fn given_a_pipe_without_a_reader_when_started_then_nobody_waits_and_a_later_reader_has_all_lines() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = pipe(folder.path());

        let log = log(&path);
        (0..20).for_each(|_| tell(&log));
        let reader = File::options().read(true).write(true).open(&path).expect("a pipe");
        let lines: Vec<_> = BufReader::new(reader).lines().take(20).collect();
        log.end().await;

        assert!(lines.iter().flatten().all(|line| line.starts_with('{') && line.ends_with('}')), "{lines:?}");
    }

    #[tokio::test]
    async fn given_a_pipe_that_nobody_reads_when_it_is_full_then_lines_are_dropped_and_the_end_does_not_wait_for_ever()
    {
        let folder = tempfile::tempdir().expect("a folder");
        let log = log(&pipe(folder.path()));
        let before = PROCESS.access_log_dropped.get();

        // More than pipe and queue hold, whatever the writer has taken meanwhile.
        (0..3 * QUEUE).for_each(|_| tell(&log));
        let dropped = PROCESS.access_log_dropped.get() - before;
        let begin = Instant::now();
        log.end().await;

        assert!(dropped > 0, "a full queue was not noticed");
        assert!(begin.elapsed() < DEADLINE, "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn given_a_pipe_that_is_read_slowly_when_more_ends_than_it_holds_then_each_line_is_whole_and_in_its_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = pipe(folder.path());
        let (log, reader) = (log(&path), File::options().read(true).write(true).open(&path).expect("a pipe"));

        // Several times what the pipe holds, and no more than the queue does.
        (0..QUEUE / 2).for_each(|_| tell(&log));
        let lines: Vec<_> = BufReader::with_capacity(512, reader).lines().take(QUEUE / 2).collect();
        log.end().await;

        assert!(lines.iter().flatten().all(|line| line.starts_with('{') && line.ends_with('}')), "torn lines");
    }

    #[test]
    fn given_a_path_that_cannot_be_opened_when_started_then_the_error_names_it() {
        let output = AccessOutput::from(PathBuf::from("/proc/access.log"));
        let options = AccessLogOptions { output, format: AccessFormat::Json, sample: NonZeroU32::MIN };

        let error = AccessLog::start(&options).expect_err("nobody makes files there");

        assert_eq!(error.to_string(), "access log /proc/access.log: cannot be opened");
        assert_eq!(AccessOutput::from(PathBuf::from("-")), AccessOutput::Stdout);
    }
}
