//! This machine as it is now: read anew when the kernel tells of a change, and now and then although it does not.
//!
//! ```text
//! kernel ─ something has changed ─▶ wait until no more comes ─▶ Host::read ─ another one than before? ─▶ Hosts
//! ```
//!
//! A change of addresses is rarely one message: an address goes and another comes, then a default route. What the kernel
//! tells is heard in `host_news`; what follows of another [`Host`] is up to those who have a [`Hosts`]: the setting of the
//! plan (`place`) and our own servers (`admin`).

use std::collections::BTreeSet;
use std::future::pending;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::causes::causes;
use crate::host::{Host, HostError};
use crate::host_news::HostNews;
use crate::stats::PROCESS;

/// The machine is read once the kernel has said nothing for so long,
const GAP: Duration = Duration::from_millis(20);
/// or so long after the first word, if there is no end of it,
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// and no sooner than this after the last time: on a node, interfaces come and go with each pod.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is read although the kernel says nothing.
const INTERVAL: Duration = Duration::from_secs(30);
/// The same, where the kernel cannot be heard, or could not be read the last time.
const BLIND_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is read anew because something has changed meanwhile: some of it may be missing then.
const READS: usize = 5;
/// Addresses that are named in one line of the log.
const NAMED: usize = 10;

/// This machine as it was read last. Clones see the same; whoever reads it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Hosts(watch::Receiver<Arc<Host>>);

impl Hosts {
    /// Reads the machine and follows it from now on, in a task on the current tokio runtime.
    ///
    /// Where it cannot be read, that is told, loopback alone is known, and it is tried again.
    pub async fn follow() -> Self {
        let news = HostNews::open(); // Before it is read, so that nothing is missed in between.
        if let Err(error) = &news {
            tracing::warn!(%error, "the kernel does not tell of changed addresses: they are read every second");
        }
        Self::follow_by(news.ok(), Host::read).await
    }

    async fn follow_by<F, R>(news: Option<HostNews>, read: F) -> Self
    where
        F: FnMut() -> R + Send + 'static,
        R: Future<Output = Result<Host, HostError>> + Send + 'static,
    {
        let looks = Looks::new(news.is_some(), Instant::now());
        let mut follower = Follower { read, news, looks, failing: false };
        let first = follower.look().await.unwrap_or_else(|| {
            tracing::warn!("until then node ports are served on 127.0.0.1 and --node-address only");
            Host::loopback_only()
        });
        let (publish, hosts) = watch::channel(Arc::new(first));
        tokio::spawn(follower.run(publish));
        Self(hosts)
    }

    /// A machine that stays as it is.
    pub fn fixed(host: Host) -> Self {
        Self(watch::channel(Arc::new(host)).1)
    }

    /// A machine that is what a test says.
    #[cfg(test)]
    pub(crate) fn by_hand(host: Host) -> (impl Fn(Host), Self) {
        let (publish, hosts) = watch::channel(Arc::new(host));
        (move |host| drop(publish.send_replace(Arc::new(host))), Self(hosts))
    }

    /// As it is now.
    pub fn now(&self) -> Arc<Host> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits until it is another one than when this was asked last. May be cancelled at any time.
    pub async fn changed(&mut self) -> Arc<Host> {
        match self.0.changed().await {
            Ok(()) => Arc::clone(&self.0.borrow_and_update()),
            Err(_) => pending().await, // Nobody follows it.
        }
    }
}

/// The task that reads. Owns what it knows by value.
struct Follower<F> {
    read: F,
    /// `None` where the kernel cannot be heard.
    news: Option<HostNews>,
    looks: Looks,
    /// True where the last look failed, which was told.
    failing: bool,
}

impl<F, R> Follower<F>
where
    F: FnMut() -> R + Send,
    R: Future<Output = Result<Host, HostError>> + Send,
{
    /// Until nobody asks any more.
    async fn run(mut self, publish: watch::Sender<Arc<Host>>) {
        loop {
            tokio::select! {
                biased;
                () = publish.closed() => return,
                () = sleep_until(self.looks.due()) => {}
                () = heard(self.news.as_mut()) => {
                    self.looks.hear(Instant::now());
                    continue;
                }
            }
            if let Some(host) = self.look().await {
                publish.send_if_modified(|known| {
                    let changed = **known != host;
                    if changed {
                        tell(&Difference::between(known, &host));
                        *known = Arc::new(host);
                    }
                    changed
                });
            }
        }
    }

    /// `None` where it cannot be read: what was known stays in use.
    async fn look(&mut self) -> Option<Host> {
        let outcome = self.read_whole().await;
        self.looks.looked(Instant::now(), outcome.is_ok());
        match outcome {
            Ok(host) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("this machine's addresses can be read again");
                }
                Some(host)
            }
            Err(error) => {
                PROCESS.host_read_errors.increment();
                if !std::mem::replace(&mut self.failing, true) {
                    let error = causes(&error);
                    tracing::warn!(error, "this machine's addresses cannot be read, trying again: the last ones count");
                }
                None
            }
        }
    }

    async fn read_whole(&mut self) -> Result<Host, HostError> {
        for _ in 1..READS {
            let host = (self.read)().await?;
            if !self.news.as_mut().is_some_and(HostNews::take) {
                return Ok(host);
            }
        }
        (self.read)().await
    }
}

async fn heard(news: Option<&mut HostNews>) {
    match news {
        Some(news) => news.heard().await,
        None => pending().await,
    }
}

/// When the machine is to be read. Pure.
#[derive(Clone, Copy, Debug)]
struct Looks {
    /// How long nothing may be heard.
    interval: Duration,
    looked: Instant,
    failed: bool,
    /// The first and the last word since then.
    news: Option<(Instant, Instant)>,
}

impl Looks {
    fn new(hears: bool, now: Instant) -> Self {
        let interval = if hears { INTERVAL } else { BLIND_INTERVAL };
        Self { interval, looked: now, failed: false, news: None }
    }

    /// Something may have changed.
    fn hear(&mut self, now: Instant) {
        let (first, _) = self.news.unwrap_or((now, now));
        self.news = Some((first, now));
    }

    /// It has been read, or could not be.
    fn looked(&mut self, now: Instant, fine: bool) {
        (self.looked, self.failed, self.news) = (now, !fine, None);
    }

    fn due(&self) -> Instant {
        let interval = if self.failed { BLIND_INTERVAL } else { self.interval };
        let anyway = self.looked + interval;
        let because = self.news.map(|(first, last)| (last + GAP).min(first + LONGEST_WAIT).max(self.looked + PAUSE));
        because.map_or(anyway, |because| because.min(anyway))
    }
}

/// What is another one on a machine than it was. Pure.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference {
    came: Vec<IpAddr>,
    gone: Vec<IpAddr>,
    /// The source addresses of the default routes, where they are others.
    default_sources: Option<Vec<IpAddr>>,
}

impl Difference {
    /// An address that another interface has as well has neither come nor gone.
    fn between(old: &Host, new: &Host) -> Self {
        let (before, after): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) = (old.addresses(), new.addresses());
        let default_sources = (old.default_sources != new.default_sources).then(|| new.default_sources.clone());
        let came = after.difference(&before).copied().collect();
        Self { came, gone: before.difference(&after).copied().collect(), default_sources }
    }
}

/// To the log. An interface of a pod that has our address, as all others have, is no news for people.
fn tell(difference: &Difference) {
    let Difference { came, gone, default_sources } = difference;
    if *difference == Difference::default() {
        return tracing::debug!("interfaces of this machine have changed");
    }
    let (came, gone) = (named(came), named(gone));
    let default_sources = default_sources.as_ref().map(|sources| named(sources));
    tracing::info!(came, gone, default_sources, "addresses of this machine have changed");
}

fn named(addresses: &[IpAddr]) -> String {
    let mut named: Vec<String> = addresses.iter().take(NAMED).map(ToString::to_string).collect();
    if addresses.len() > NAMED {
        named.push(format!("and {} more", addresses.len() - NAMED));
    }
    named.join(", ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::host::InterfaceAddress;

    fn host(addresses: &[&str]) -> Host {
        let found = |(number, text): (usize, &&str)| InterfaceAddress {
            interface: format!("eth{number}"),
            address: text.parse().expect("an address"),
            prefix: 32,
        };
        Host { interfaces: addresses.iter().enumerate().map(found).collect(), default_sources: vec![] }
    }

    fn ips(addresses: &[&str]) -> Vec<IpAddr> {
        addresses.iter().map(|text| text.parse().expect("an address")).collect()
    }

    #[test]
    fn f31_given_two_machines_when_compared_then_what_came_and_went_is_told_once() {
        let old = host(&["10.0.0.5", "169.254.1.1", "fd00::5"]);
        let mut new = host(&["fd00::5", "10.0.0.6", "fd00::5"]);
        let moved =
            Difference { came: ips(&["10.0.0.6"]), gone: ips(&["10.0.0.5", "169.254.1.1"]), default_sources: None };

        assert_eq!(Difference::between(&old, &new), moved);
        assert_eq!(Difference::between(&new, &new), Difference::default());

        new.default_sources = ips(&["10.0.0.6"]);
        assert_eq!(Difference::between(&old, &new).default_sources, Some(ips(&["10.0.0.6"])));
    }

    #[test]
    fn given_another_interface_with_a_known_address_when_compared_then_it_is_no_news() {
        let (one, two) = (host(&["10.82.0.1"]), host(&["10.82.0.1", "10.82.0.1"]));

        assert_eq!(Difference::between(&one, &two), Difference::default());
        assert_eq!(Difference::between(&two, &one), Difference::default());
    }

    #[test]
    fn f31_given_news_when_they_come_together_or_without_end_then_one_look_follows_soon() {
        let start = Instant::now();
        let mut looks = Looks::new(true, start);
        assert_eq!(looks.due(), start + INTERVAL);

        let (first, later) = (start + Duration::from_secs(1), start + Duration::from_millis(1_015));
        looks.hear(first);
        assert_eq!(looks.due(), first + GAP);
        looks.hear(later);
        assert_eq!(looks.due(), later + GAP, "more may come");
        (0..100).for_each(|number| looks.hear(first + number * GAP / 2));
        assert_eq!(looks.due(), first + LONGEST_WAIT, "but it is not waited for ever");

        looks.looked(later, true);
        assert_eq!(looks.due(), later + INTERVAL);
        looks.hear(later);
        assert_eq!(looks.due(), later + PAUSE, "a machine that changes all the time is not read all the time");
        assert!(LONGEST_WAIT.max(PAUSE) + GAP < Duration::from_millis(500), "of the second that F31 allows");
    }

    #[test]
    fn t219_given_a_kernel_that_cannot_be_heard_or_read_when_looked_at_then_it_is_again_within_a_second() {
        let start = Instant::now();
        assert_eq!(Looks::new(false, start).due(), start + BLIND_INTERVAL);

        let mut looks = Looks::new(true, start);
        looks.looked(start, false);
        assert_eq!(looks.due(), start + BLIND_INTERVAL);
        looks.looked(start, true);
        assert_eq!(looks.due(), start + INTERVAL);
    }

    /// A machine whose states are read one after the other, `None` where it cannot be; the last one for ever.
    async fn reading(states: Vec<Option<Host>>) -> Hosts {
        let (mut states, mut last) = (states.into_iter(), None);
        Hosts::follow_by(None, move || {
            last = states.next().or(last.take());
            let outcome = last.clone().flatten().ok_or_else(|| HostError::Open(io::ErrorKind::OutOfMemory.into()));
            std::future::ready(outcome)
        })
        .await
    }

    #[tokio::test(start_paused = true)]
    async fn t223_given_a_list_that_cannot_be_read_when_it_was_known_then_it_stays_in_use_and_each_try_is_counted() {
        let (known, later) = (host(&["10.0.0.5"]), host(&["10.0.0.6"]));
        let before = PROCESS.host_read_errors.get();
        let mut hosts = reading(vec![Some(known.clone()), None, None, Some(later.clone())]).await;

        let unchanged = tokio::time::timeout(BLIND_INTERVAL * 5 / 2, hosts.changed()).await;
        assert!(unchanged.is_err(), "{unchanged:?}");
        assert_eq!(*hosts.now(), known);
        assert!(PROCESS.host_read_errors.get() >= before + 2);

        assert_eq!(*hosts.changed().await, later);
    }

    #[tokio::test(start_paused = true)]
    async fn t223_given_a_machine_that_cannot_be_read_at_first_when_it_can_then_it_is_known() {
        let known = host(&["10.0.0.5"]);

        let mut hosts = reading(vec![None, Some(known.clone())]).await;

        assert!(hosts.now().addresses().iter().all(IpAddr::is_loopback), "{hosts:?}");
        assert_eq!(*hosts.changed().await, known);
    }

    #[tokio::test(start_paused = true)]
    async fn given_a_machine_when_nobody_asks_any_more_then_nobody_reads_it() {
        let (reads, mut readers) = tokio::sync::mpsc::unbounded_channel();
        let hosts = Hosts::follow_by(None, move || {
            let _ = reads.send(()); // Whoever counts may have gone.
            std::future::ready(Ok(host(&["10.0.0.5"])))
        })
        .await;

        drop(hosts);

        while readers.recv().await.is_some() {} // Ends with the task.
    }

    #[tokio::test]
    async fn given_a_machine_that_stays_when_asked_then_it_is_what_it_was_and_never_another() {
        let mut hosts = Hosts::fixed(host(&["10.0.0.5"]));

        assert_eq!(*hosts.now(), host(&["10.0.0.5"]));
        assert!(futures_util::FutureExt::now_or_never(hosts.changed()).is_none());
    }
}
