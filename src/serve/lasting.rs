//! Options of connections that last: keep-alive on both sides, user timeout upstream.
//!
//! They find a peer that has vanished, and these system calls are too much for a connection that is over in
//! milliseconds, and on ten thousand listeners that hand their options down. So they are set when a connection has lasted
//! `LASTING_AFTER`: a task of each worker looks which have, for as long as there are newcomers.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use crate::serve::reactor::Party;
use crate::serve::socket;
use crate::serve::stream::Stream;
use crate::serve::worker::{self, sleep_until};

/// How long a connection has to last, and half of the longest that it may last before it is noticed.
const LASTING_AFTER: Duration = Duration::from_secs(5);

/// What the connection to a backend is given if it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// How a client is asked whether it is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeepAlive {
    /// Silence before the first question. Whole seconds.
    pub(crate) idle: Duration,
    /// Questions without an answer, a third of `idle` apart, before it is given up (1..=127).
    pub(crate) probes: u32,
}

/// What the two sockets of a relay are given if they last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IfLasting {
    pub(crate) client: KeepAlive,
    pub(crate) backend: LastingOptions,
}

impl IfLasting {
    fn set(&self, socket: impl AsFd, party: Party) -> io::Result<()> {
        match party {
            Party::Client => socket::keep_alive(socket, self.client.idle, self.client.probes),
            Party::Backend => self.backend.set(socket),
        }
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

thread_local! {
    /// A task of this worker looks after newcomers.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// Gives the two sockets of a connection their options once it has lasted.
pub(crate) fn set_if_they_last(client: &Stream, backend: &Stream, options: IfLasting) {
    look_after([(client, Party::Client), (backend, Party::Backend)], options, LASTING_AFTER);
}

fn look_after<'s>(streams: impl IntoIterator<Item = (&'s Stream, Party)>, options: IfLasting, interval: Duration) {
    streams.into_iter().for_each(|(stream, party)| stream.count_age(party));
    if !LOOKING.replace(true) {
        worker::current().spawn(look(options, interval, Looking));
    }
}

/// Held by the task that looks, until its end of whatever kind.
struct Looking;

impl Drop for Looking {
    fn drop(&mut self) {
        LOOKING.set(false);
    }
}

/// Each look takes those that the last one found new: they have lasted once to twice the time in between.
async fn look(options: IfLasting, interval: Duration, _looking: Looking) {
    loop {
        sleep_until(Instant::now() + interval).await;
        let newcomers = worker::current().grow_older(|socket, party| {
            let _ = options.set(socket, party); // A socket that refuses is one that has been reset meanwhile.
        });
        if newcomers == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::scripted::{on_worker, pair, registered, until};

    const SOON: Duration = Duration::from_millis(10);

    fn options() -> IfLasting {
        let client = KeepAlive { idle: Duration::from_secs(30), probes: 5 };
        IfLasting { client, backend: LastingOptions::default() }
    }

    #[test]
    fn t173_given_an_upstream_connection_when_it_lasts_then_a_vanished_backend_will_be_noticed() {
        on_worker(async {
            let (_far, near) = pair().await;
            let stream = registered(near);

            look_after([(&stream, Party::Backend)], options(), SOON);

            let socket = SockRef::from(&stream);
            until(|| socket.tcp_user_timeout().expect("an option") == Some(Duration::from_secs(120))).await;
            assert!(socket.keepalive().expect("an option"));
            assert_eq!(socket.tcp_keepalive_time().expect("an option"), Duration::from_secs(60));
        });
    }

    #[test]
    fn t173_given_a_clients_connection_when_it_lasts_then_a_vanished_client_will_be_noticed_and_a_slow_one_may_be_slow()
    {
        on_worker(async {
            let (_far, near) = pair().await;
            let stream = registered(near);

            look_after([(&stream, Party::Client)], options(), SOON);

            let socket = SockRef::from(&stream);
            until(|| socket.keepalive().expect("an option")).await;
            assert_eq!(socket.tcp_keepalive_time().expect("an option"), Duration::from_secs(30));
            assert_eq!(socket.tcp_keepalive_interval().expect("an option"), Duration::from_secs(10));
            assert_eq!(socket.tcp_keepalive_retries().expect("an option"), 5);
            assert_eq!(socket.tcp_user_timeout().expect("an option"), None);
        });
    }

    #[test]
    fn given_newcomers_that_last_or_end_when_none_is_left_then_nobody_looks_any_more() {
        on_worker(async {
            let (_far, near) = pair().await;
            let (_other_far, other_near) = pair().await;
            let (lasting, short) = (registered(near), registered(other_near));
            look_after([(&lasting, Party::Client), (&short, Party::Backend)], options(), SOON);

            drop(short);

            until(|| !LOOKING.get()).await;
            assert!(SockRef::from(&lasting).keepalive().expect("an option"));
        });
    }

    #[test]
    fn given_a_task_that_looks_when_it_ends_before_its_time_then_the_next_newcomer_begins_another() {
        on_worker(async {
            let (_far, near) = pair().await;
            look_after([(&registered(near), Party::Backend)], options(), Duration::from_secs(3_600));
            assert!(LOOKING.get());
        });

        assert!(!LOOKING.get(), "its worker has ended on this thread");
    }
}
