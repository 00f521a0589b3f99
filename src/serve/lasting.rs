//! Options of upstream connections that last: keep-alive and user timeout.
//!
//! They find a backend that has vanished, and three system calls are too much for a connection that is over in
//! milliseconds. So they are set when a connection has lasted `LASTING_AFTER`; the newcomers of that time are swept by
//! one task, which sleeps while there are none. Sockets of clients inherit theirs from the listener.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::serve::stream::Stream;

/// How long a connection has to last, and half of the longest that it may last before it is noticed.
const LASTING_AFTER: Duration = Duration::from_secs(5);

/// What a connection that lasts is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastingOptions {
    /// Silence after which a backend is asked whether it is still there. Whole seconds. Default 60 s.
    pub keepalive_idle: Duration,
    /// How long bytes (or questions whether it is still there) may wait for a backend's acknowledgement,
    /// a closed window included, before the connection is given up. Default 2 min.
    pub user_timeout: Duration,
}

impl Default for LastingOptions {
    fn default() -> Self {
        Self { keepalive_idle: Duration::from_secs(60), user_timeout: Duration::from_secs(120) }
    }
}

impl LastingOptions {
    /// The user timeout ends what the keep-alive finds dead, so its interval and count stay the kernel's: two calls less.
    fn set(&self, socket: impl AsFd) -> io::Result<()> {
        let socket = socket.as_fd();
        let socket = SockRef::from(&socket);
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(self.keepalive_idle))?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))
    }
}

/// Where new connections are announced. Dropped, it ends its sweeper.
#[derive(Debug)]
pub(crate) struct Newcomers(UnboundedSender<Weak<OwnedFd>>);

impl Newcomers {
    /// The announcements, and the task that sweeps them, to be spawned.
    pub(crate) fn swept_with(options: LastingOptions) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, receiver) = unbounded_channel();
        (Self(sender), Sweeper { receiver, options }.run(LASTING_AFTER))
    }

    /// Announces a connection. It is not kept open for it.
    pub(crate) fn add(&self, stream: &Stream) {
        let _ = self.0.send(Arc::downgrade(stream.socket())); // Without a sweeper, the runtime is going away.
    }
}

struct Sweeper {
    receiver: UnboundedReceiver<Weak<OwnedFd>>,
    options: LastingOptions,
}

impl Sweeper {
    /// Each sweep takes those that the last one found new: they have lasted once to twice the time in between.
    async fn run(mut self, interval: Duration) {
        let mut last = Vec::new();
        loop {
            if last.is_empty() {
                match self.receiver.recv().await {
                    Some(newcomer) => last.push(newcomer),
                    None => return,
                }
            }
            tokio::time::sleep(interval).await;
            let new = self.drain();
            for socket in std::mem::replace(&mut last, new).iter().filter_map(Weak::upgrade) {
                let _ = self.options.set(&socket); // A socket that refuses is one that has been reset meanwhile.
            }
        }
    }

    fn drain(&mut self) -> Vec<Weak<OwnedFd>> {
        std::iter::from_fn(|| self.receiver.try_recv().ok()).filter(|newcomer| newcomer.strong_count() > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::scripted::{pair, registered, soon, until};

    #[tokio::test]
    async fn t173_given_an_upstream_connection_when_it_lasts_then_a_vanished_backend_will_be_noticed() {
        let (_far, near) = pair().await;
        let stream = registered(near);
        let (sender, receiver) = unbounded_channel();
        let newcomers = Newcomers(sender);
        let sweeper = Sweeper { receiver, options: LastingOptions::default() };
        tokio::spawn(sweeper.run(Duration::from_millis(10)));

        newcomers.add(&stream);

        let socket = SockRef::from(&stream);
        until(|| socket.tcp_user_timeout().expect("an option") == Some(Duration::from_secs(120))).await;
        assert!(socket.keepalive().expect("an option"));
        assert_eq!(socket.tcp_keepalive_time().expect("an option"), Duration::from_secs(60));
    }

    #[tokio::test]
    async fn given_a_connection_when_it_is_announced_then_nobody_holds_it_open() {
        let (_far, near) = pair().await;
        let stream = registered(near);
        let (newcomers, sweeper) = Newcomers::swept_with(LastingOptions::default());
        let sweeping = tokio::spawn(sweeper);

        newcomers.add(&stream);
        tokio::task::yield_now().await;

        assert_eq!(Arc::strong_count(stream.socket()), 1);
        sweeping.abort();
    }

    #[tokio::test]
    async fn given_no_one_who_announces_when_swept_then_it_ends() {
        let (newcomers, sweeper) = Newcomers::swept_with(LastingOptions::default());

        drop(newcomers);

        soon(sweeper).await;
    }
}
