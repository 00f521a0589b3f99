//! Workers, case by case: orders and tasks, panics, placement, listeners, the end.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::unbounded_channel;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::serve::reactor::Ready;
use crate::serve::scripted::{DEADLINE, soon};
use crate::serve::socket;
use crate::serve::worker::{sleep_until, watch, watch_listener};

const HOUR: Duration = Duration::from_secs(3_600);

fn pool(count: usize) -> Pool {
    Pool::start(count).expect("threads")
}

fn heard<T>(told: &Receiver<T>) -> T {
    told.recv_timeout(DEADLINE).expect("in time")
}

fn wait<T>(what: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(soon(what))
}

/// Has a worker begin a task that is made there.
fn begin<F: Future<Output = ()> + 'static>(mailbox: &Mailbox, task: impl FnOnce() -> F + Send + 'static) {
    mailbox.order(|worker| worker.spawn(task()));
}

fn loads(pool: &Pool) -> Vec<usize> {
    pool.workers.iter().map(|mailbox| mailbox.load()).collect()
}

// ---- Orders and tasks ----

#[test]
fn given_sleeping_workers_when_many_threads_give_orders_then_none_is_lost_and_each_wakes() {
    let pool = pool(2);
    let done = Arc::new(AtomicUsize::new(0));

    thread::scope(|scope| {
        for number in 0..8 {
            let (pool, done) = (&pool, &done);
            scope.spawn(move || {
                let (tell, told) = channel();
                for round in 0..2_000 {
                    let (tell, done) = (tell.clone(), Arc::clone(done));
                    pool.workers[(number + round) % 2].order(move |_| {
                        done.fetch_add(1, Ordering::Relaxed);
                        let _ = tell.send(round);
                    });
                    if round % 3 == 0 {
                        while heard(&told) != round {} // Both workers are asleep or about to be.
                    }
                }
            });
        }
    });

    pool.ask(|| ()); // What was ordered before is done.
    assert_eq!(done.load(Ordering::Relaxed), 16_000);
}

#[test]
fn given_orders_that_may_wait_when_another_comes_then_all_are_done_in_their_order() {
    let pool = pool(1);
    let (tell, told) = channel();

    for number in 0..3 {
        let tell = tell.clone();
        pool.workers[0].order_in_time(move |_| _ = tell.send(number));
    }
    pool.workers[0].order(move |_| _ = tell.send(3));

    assert_eq!([0; 4].map(|_| heard(&told)), [0, 1, 2, 3]);
}

#[test]
fn given_a_task_that_waits_for_another_thread_when_that_wakes_it_then_it_is_polled_each_time() {
    let pool = pool(1);
    let (ask, mut asked) = unbounded_channel();
    let (tell, told) = channel();
    begin(&pool.workers[0], || async move {
        while let Some(number) = asked.recv().await {
            tell.send(number).expect("the test");
        }
    });

    for number in 0..2_000 {
        ask.send(number).expect("a task");
        assert_eq!(heard(&told), number);
    }
}

#[test]
fn given_a_task_that_waits_when_the_last_who_could_wake_it_goes_then_it_is_dropped() {
    let pool = pool(1);
    let (held, gone) = channel();
    begin(&pool.workers[0], || {
        poll_fn(move |cx| {
            let _ = held.send(cx.waker().clone());
            Poll::Pending
        })
    });
    let waker = heard(&gone);
    pool.ask(|| ()); // Its poll is over.

    drop(waker);

    assert!(matches!(gone.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected)));
}

#[test]
fn given_tasks_that_wake_themselves_when_they_do_so_without_end_then_orders_and_others_get_their_turn() {
    let pool = pool(1);
    let stop = CancellationToken::new();
    for _ in 0..3 {
        let stop = stop.clone();
        begin(&pool.workers[0], || {
            poll_fn(move |cx| {
                cx.waker().wake_by_ref();
                if stop.is_cancelled() { Poll::Ready(()) } else { Poll::Pending }
            })
        });
    }
    let (tell, told) = channel();

    begin(&pool.workers[0], || async move {
        sleep_until(Instant::now() + Duration::from_millis(1)).await;
        tell.send(()).expect("the test");
    });

    heard(&told);
    stop.cancel();
}

// ---- Panics ----

#[test]
fn given_an_order_that_panics_when_others_came_with_it_then_they_are_carried_out() {
    let pool = pool(1);
    let (tell, told) = channel();

    pool.workers[0].order_in_time(|_| resume_unwind(Box::new("on purpose")));
    pool.workers[0].order(move |_| _ = tell.send(()));

    heard(&told);
}

#[test]
fn given_a_task_that_panics_when_others_are_there_then_only_it_ends() {
    let pool = pool(1);
    let (held, gone) = channel::<()>();
    let (ask, mut asked) = unbounded_channel();
    let (tell, told) = channel();
    begin(&pool.workers[0], || async move { tell.send(asked.recv().await).expect("the test") });

    begin(&pool.workers[0], || async move {
        let _held = held;
        resume_unwind(Box::new("on purpose"))
    });

    assert_eq!(gone.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected));
    ask.send(7).expect("a task");
    assert_eq!(heard(&told), Some(7));
}

// ---- Placement ----

#[test]
fn given_tasks_that_stay_when_placed_from_one_worker_then_all_carry_as_many_until_they_end() {
    let pool = Arc::new(pool(2));
    let stop = CancellationToken::new();
    let (tell, told) = channel();

    let (placing, until) = (Arc::clone(&pool), stop.clone());
    pool.workers[0].order(move |worker| {
        for _ in 0..8 {
            let (tell, until) = (tell.clone(), until.clone());
            placing.place(worker, move |seat| async move {
                let _seat = seat;
                tell.send(thread::current().name().map(str::to_owned)).expect("the test");
                until.cancelled().await;
            });
        }
    });

    let mut names: Vec<_> = (0..8).filter_map(|_| heard(&told)).collect();
    names.sort();
    assert_eq!(names, [["tcp-0"; 4], ["tcp-1"; 4]].concat());
    assert_eq!(loads(&pool), [4, 4]);
    stop.cancel();
    assert_eq!(told.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected), "all have ended");
    pool.ask(|| ());
    assert_eq!(loads(&pool), [0, 0]);
}

// ---- Listeners ----

fn listener() -> (Arc<OwnedFd>, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("a flag");
    let address = listener.local_addr().expect("a bound socket");
    (Arc::new(listener.into()), address)
}

/// Does what it is told to at each readiness, in a listener's acceptor.
struct Script<F>(F);

impl<F: Fn(&Rc<Worker>)> Readable for Script<F> {
    fn readable(&self, worker: &Rc<Worker>) {
        self.0(worker);
    }
}

/// Accepts one client at a time and tells who it was.
fn accepting(listener: &Arc<OwnedFd>, told: Sender<std::net::SocketAddr>) -> impl Fn(&Rc<Worker>) + Clone + use<> {
    let listener = Arc::clone(listener);
    move |_| {
        if let Ok((_, peer)) = socket::accept(&listener) {
            told.send(peer).expect("the test");
        }
    }
}

#[test]
fn given_a_listener_that_four_workers_watch_when_clients_come_at_once_then_each_is_accepted_once() {
    let pool = pool(5);
    let (listener, address) = listener();
    let (tell, told) = channel();
    let accept = accepting(&listener, tell);
    let listening = pool.listen(&listener, move |_| Script(accept.clone())).expect("watches");

    let clients = thread::scope(|scope| {
        let connect = || TcpStream::connect(address).expect("a listener");
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(move || (0..50).map(|_| connect()).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });

    let mut expected: Vec<_> = clients.iter().map(|client| client.local_addr().expect("a socket")).collect();
    let mut accepted: Vec<_> = clients.iter().map(|_| heard(&told)).collect();
    expected.sort();
    accepted.sort();
    assert_eq!(accepted, expected);
    let ended = wait(listening.end());
    assert_eq!(told.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected), "nobody accepts any more");
    drop(listener);
    assert_eq!(Arc::strong_count(&ended), 1, "nobody else holds the socket");
}

#[test]
fn given_a_listener_that_ended_when_it_is_watched_again_then_it_accepts() {
    let pool = pool(2);
    let (listener, address) = listener();
    let (tell, told) = channel();

    for _ in 0..20 {
        let accept = accepting(&listener, tell.clone());
        let listening = pool.listen(&listener, move |_| Script(accept.clone())).expect("watches");
        let client = TcpStream::connect(address).expect("a listener");
        assert_eq!(heard(&told), client.local_addr().expect("a socket"));
        wait(listening.end());
    }
}

#[test]
fn given_an_acceptor_that_panics_when_called_again_then_the_client_is_accepted() {
    let pool = pool(1);
    let (listener, address) = listener();
    let (tell, told) = channel();
    let accept = accepting(&listener, tell);
    let make = move |_| {
        let (accept, calls) = (accept.clone(), Cell::new(0));
        Script(move |worker: &Rc<Worker>| match calls.replace(calls.get() + 1) {
            0 => resume_unwind(Box::new("on purpose")),
            _ => accept(worker),
        })
    };
    let _listening = pool.listen(&listener, make).expect("watches");

    let client = TcpStream::connect(address).expect("a listener");

    assert_eq!(heard(&told), client.local_addr().expect("a socket"));
}

#[test]
fn given_a_muted_listener_when_the_pause_is_over_then_it_accepts_who_waited() {
    let pool = pool(2);
    let (listener, address) = listener();
    let (tell, told) = channel();
    let accept = accepting(&listener, tell);
    let socket = Arc::clone(&listener);
    let make = move |number| {
        let (accept, socket, calls) = (accept.clone(), Arc::clone(&socket), Cell::new(0));
        Script(move |worker: &Rc<Worker>| match calls.replace(calls.get() + 1) {
            0 => worker.mute(number, &socket, Duration::from_millis(5)),
            _ => accept(worker),
        })
    };
    let _listening = pool.listen(&listener, make).expect("watches");

    let clients = [(); 4].map(|()| TcpStream::connect(address).expect("a listener"));

    let mut accepted = clients.each_ref().map(|_| heard(&told));
    let mut expected = clients.map(|client| client.local_addr().expect("a socket"));
    accepted.sort();
    expected.sort();
    assert_eq!(accepted, expected);
}

#[test]
fn given_a_muted_listener_when_it_ends_then_nobody_holds_it_and_nobody_watches_it_again() {
    let pool = pool(1);
    let (listener, address) = listener();
    let (tell, told) = channel();
    let socket = Arc::clone(&listener);
    let make = move |number| {
        let (tell, socket) = (tell.clone(), Arc::clone(&socket));
        Script(move |worker: &Rc<Worker>| {
            worker.mute(number, &socket, Duration::from_millis(1));
            tell.send(()).expect("the test");
        })
    };
    let listening = pool.listen(&listener, make).expect("watches");
    let _client = TcpStream::connect(address).expect("a listener");
    heard(&told);

    wait(listening.end());

    while told.recv_timeout(DEADLINE).is_ok() {} // It was told again before it ended.
    let (tell, told) = channel();
    begin(&pool.workers[0], || async move {
        sleep_until(Instant::now() + Duration::from_millis(5)).await; // Longer than the pause.
        tell.send(()).expect("the test");
    });
    heard(&told);
    assert_eq!(Arc::strong_count(&listener), 1);
    watch_listener(pool.workers[0].epoll(), &listener, Foreign(99)).expect("watched by nobody");
}

#[test]
fn given_a_listener_that_no_event_loop_takes_when_watched_then_it_fails_and_nobody_holds_it() {
    let pool = pool(2);
    let file: Arc<OwnedFd> = Arc::new(std::fs::File::open("/proc/self/exe").expect("this program").into());
    let socket = Arc::clone(&file);

    let outcome = pool.listen(&file, move |_| {
        let socket = Arc::clone(&socket);
        Script(move |_: &Rc<Worker>| drop(socket::accept(&socket)))
    });

    assert!(outcome.is_err());
    pool.ask(|| ()); // What was ordered before is done.
    assert_eq!(Arc::strong_count(&file), 1);
}

// ---- The end ----

#[test]
fn given_tasks_of_all_kinds_when_the_pool_is_dropped_then_they_are_dropped_and_their_threads_end() {
    let pool = pool(2);
    let mailboxes: Vec<_> = pool.workers.iter().map(Arc::downgrade).collect();
    let (held, gone) = channel();
    for mailbox in &pool.workers {
        let (near, far) = UnixStream::pair().expect("sockets");
        let waits_for_a_socket = held.clone();
        begin(mailbox, || async move {
            let (_held, _far) = (waits_for_a_socket.send(()), far);
            let socket = watch(near.into()).expect("an event loop");
            poll_fn(|cx| socket.poll_ready(cx, Ready::PRI)).await;
            drop(waits_for_a_socket);
        });
        let waits_for_a_time = held.clone();
        begin(mailbox, || async move {
            let _ = waits_for_a_time.send(());
            sleep_until(Instant::now() + HOUR).await;
            drop(waits_for_a_time);
        });
        let never_waits = held.clone();
        begin(mailbox, || async move {
            let _ = never_waits.send(());
            poll_fn(|cx| {
                cx.waker().wake_by_ref();
                Poll::<()>::Pending
            })
            .await;
            drop(never_waits);
        });
    }
    drop(held);
    (0..6).for_each(|_| heard(&gone));

    drop(pool);

    assert_eq!(gone.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected), "all are dropped");
    let begin = Instant::now();
    while mailboxes.iter().any(|mailbox| mailbox.strong_count() > 0) {
        assert!(begin.elapsed() < DEADLINE, "threads that never end");
        thread::yield_now();
    }
}

#[test]
fn given_a_pool_when_it_is_dropped_on_a_thread_of_its_own_then_that_ends_too() {
    let pool = pool(2);
    let mailboxes: Vec<_> = pool.workers.iter().map(Arc::downgrade).collect();

    let first = Arc::clone(&pool.workers[0]);
    first.order(move |_| drop(pool));
    drop(first);

    let begin = Instant::now();
    while mailboxes.iter().any(|mailbox| mailbox.strong_count() > 0) {
        assert!(begin.elapsed() < DEADLINE, "threads that never end");
        thread::yield_now();
    }
}

#[test]
fn given_workers_that_have_ended_when_listeners_end_then_nobody_waits_for_them() {
    let pool = pool(2);
    let (listener, _) = listener();
    let (other, _) = self::listener();
    let [listening, _other] =
        [&listener, &other].map(|it| pool.listen(it, |_| Script(|_: &Rc<Worker>| ())).expect("watches"));

    drop(pool);

    let ended = wait(listening.end());
    assert!(Arc::ptr_eq(&ended, &listener));
}

/// It could be dropped on its own thread alone.
#[test]
fn given_a_task_whose_worker_has_ended_when_another_thread_wakes_it_then_nothing_happens() {
    let pool = pool(1);
    let mailbox = Arc::clone(&pool.workers[0]);
    let (ask, mut asked) = unbounded_channel::<()>();
    let (tell, told) = channel();
    begin(&mailbox, || async move {
        tell.send(()).expect("the test");
        asked.recv().await;
    });
    heard(&told);
    drop(pool);
    while !mailbox.is_closed() {
        thread::yield_now();
    }

    drop(ask);

    assert_eq!(told.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout), "it is still what it was");
}

#[test]
fn given_tasks_that_wait_for_sockets_when_all_are_woken_then_each_looks_again() {
    let pool = pool(2);
    let (tell, told) = channel();
    for mailbox in &pool.workers {
        let (near, far) = UnixStream::pair().expect("sockets");
        let tell = tell.clone();
        begin(mailbox, || async move {
            let (_far, mut polls) = (far, 0);
            let socket = watch(near.into()).expect("an event loop");
            poll_fn(|cx| {
                polls += 1;
                tell.send(polls).expect("the test");
                socket.poll_ready(cx, Ready::PRI)
            })
            .await;
        });
    }
    assert_eq!([heard(&told), heard(&told)], [1, 1]);

    pool.wake_all();

    assert_eq!([heard(&told), heard(&told)], [2, 2]);
}
