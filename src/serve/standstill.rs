//! How the relays of a worker come to a standstill, tell what they have, and go on or leave: a hand-over to another process.
//!
//! An order reaches a worker between two polls, and so each of its relays between two system calls. It wakes them all, and
//! each looks at one word of its thread when it is polled, which is all that this costs where nothing is handed over:
//!
//! ```text
//!            rest             tell, some at a time            leave
//!   flowing ─────▶ resting ─────────────────────────▶ told ─────────▶ gone, without an end
//!      ▲              │                                 │
//!      └──────────────┴───────────── go on ─────────────┘
//! ```
//!
//! A relay keeps all that it has, and tells of it with further descriptors: so whoever goes on has lost nothing. What reaches
//! its backend after the standstill has begun, and what cannot be told of, goes on at once and comes to its end in this
//! process. While others rest nobody is accepted: clients wait in the kernel, for one of the two processes.
//!
//! What a relay tells, and who asks, is `moving_stream`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use crate::serve::moving_stream::MovingStream;
use crate::serve::worker::Worker;

/// How long an acceptor waits before it looks again whether it may accept.
pub(super) const PAUSE: Duration = Duration::from_millis(2);

/// What the relays of a thread are asked to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Flow,
    /// Those that are polled come to a standstill.
    Rest,
    /// All are where they are.
    Still,
    /// Those at a standstill that are polled tell what they have.
    Tell,
    /// Those that have told are another process's.
    Leave,
}

thread_local! {
    static STAGE: Cell<Stage> = const { Cell::new(Stage::Flow) };
    /// How often there was a rest. A relay that is still at the last one when the next begins is one of this, too.
    static ROUND: Cell<u32> = const { Cell::new(0) };
    /// The round whose streams are another process's: whoever has told in it never moves anything again.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    /// From the first rest on, until all goes on: after a hand-over it is the other process that accepts.
    static ACCEPTS: Cell<bool> = const { Cell::new(true) };
    static RESTING: RefCell<Resting> = const { RefCell::new(Resting { wakers: Vec::new(), next: 0, told: Vec::new() }) };
}

/// The relays of a thread that are at a standstill.
struct Resting {
    wakers: Vec<Waker>,
    /// Who is asked next.
    next: usize,
    told: Vec<MovingStream>,
}

/// Where a relay is, and in which round. Kept by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Standing {
    #[default]
    Flowing,
    Resting(u32),
    /// It could not tell, for want of descriptors most likely, and is asked once more after the others.
    Again(u32),
    Told(u32),
}

/// What a relay has to do when it is polled.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Bidding {
    Move,
    Wait,
    Tell,
    Leave,
}

impl Standing {
    /// Asks for the bidding.
    pub(super) fn ask(&mut self, cx: &Context<'_>) -> Bidding {
        match (STAGE.get(), *self) {
            (_, Self::Told(round)) if LEFT.get() == Some(round) => Bidding::Leave,
            (Stage::Flow, _) => {
                *self = Self::Flowing;
                Bidding::Move
            }
            (Stage::Rest, standing) if standing.round() != Some(ROUND.get()) => {
                *self = Self::Resting(ROUND.get());
                RESTING.with_borrow_mut(|resting| resting.wakers.push(cx.waker().clone()));
                Bidding::Wait
            }
            (_, Self::Flowing) => Bidding::Move, // It began too late.
            (Stage::Tell, Self::Resting(_) | Self::Again(_)) => Bidding::Tell,
            (_, Self::Resting(_) | Self::Again(_) | Self::Told(_)) => Bidding::Wait,
        }
    }

    /// Tells. `None`: it cannot; the second time, it goes on.
    pub(super) fn tell(&mut self, cx: &Context<'_>, stream: Option<MovingStream>) {
        *self = match (&stream, *self) {
            (Some(_), _) => Self::Told(ROUND.get()),
            (None, Self::Resting(round)) => {
                RESTING.with_borrow_mut(|resting| resting.wakers.push(cx.waker().clone()));
                Self::Again(round)
            }
            (None, _) => Self::Flowing,
        };
        RESTING.with_borrow_mut(|resting| resting.told.extend(stream));
    }

    /// True where another process knows of it.
    pub(super) fn is_told(self) -> bool {
        matches!(self, Self::Told(_))
    }

    fn round(self) -> Option<u32> {
        match self {
            Self::Flowing => None,
            Self::Resting(round) | Self::Again(round) | Self::Told(round) => Some(round),
        }
    }
}

/// False where clients are to wait in the kernel.
pub(super) fn accepts() -> bool {
    ACCEPTS.get()
}

/// Has all relays of this worker come to a standstill, and then tells how many have.
pub(super) fn rest(worker: &Rc<Worker>, done: impl FnOnce(usize) + 'static) {
    begin_round();
    worker.wake_all();
    // Tasks that are ready are polled in the order of their waking: after this all have been.
    let stage = Begun::now();
    worker.spawn(async move {
        stage.be_still();
        done(RESTING.with_borrow(|resting| resting.wakers.len()));
    });
}

/// Has so many of them tell what they have, and a few more maybe, and then gives that on, with true where nobody is left.
pub(super) fn tell(worker: &Rc<Worker>, at_once: usize, done: impl FnOnce(Vec<MovingStream>, bool) + 'static) {
    STAGE.set(Stage::Tell);
    RESTING.with_borrow_mut(|resting| {
        let last = (resting.next + at_once).min(resting.wakers.len());
        resting.wakers[resting.next..last].iter().for_each(Waker::wake_by_ref);
        resting.next = last;
    });
    let stage = Begun::now();
    worker.spawn(async move {
        stage.be_still();
        let is_last = RESTING.with_borrow(|resting| resting.next == resting.wakers.len());
        done(RESTING.with_borrow_mut(|resting| std::mem::take(&mut resting.told)), is_last);
    });
}

/// Has all go on as before.
pub(super) fn go_on() {
    ACCEPTS.set(true);
    wake_with(Stage::Flow);
}

/// Has those that have told leave, and then says so. The others go on; nobody is accepted any more.
pub(super) fn leave(worker: &Rc<Worker>, done: impl FnOnce() + 'static) {
    begin_leaving();
    worker.retire();
    RESTING.with_borrow(|resting| resting.wakers.iter().for_each(Waker::wake_by_ref));
    let stage = Begun::now();
    worker.spawn(async move {
        if stage.lasts() {
            wake_with(Stage::Flow);
        }
        done();
    });
}

fn begin_leaving() {
    LEFT.set(Some(ROUND.get()));
    STAGE.set(Stage::Leave);
}

/// A stage that was begun, and in which round. A worker that was late finds several orders at once, and then what ends a stage
/// runs when another one has begun: it must not end that.
#[derive(Clone, Copy)]
struct Begun(Stage, u32);

impl Begun {
    fn now() -> Self {
        Self(STAGE.get(), ROUND.get())
    }

    fn lasts(self) -> bool {
        (self.0, self.1) == (STAGE.get(), ROUND.get())
    }

    fn be_still(self) {
        if self.lasts() {
            STAGE.set(Stage::Still);
        }
    }
}

fn begin_round() {
    ACCEPTS.set(false);
    ROUND.set(ROUND.get().wrapping_add(1));
    STAGE.set(Stage::Rest);
}

fn wake_with(stage: Stage) {
    STAGE.set(stage);
    let Resting { wakers, told, .. } = RESTING.replace(Resting { wakers: Vec::new(), next: 0, told: Vec::new() });
    wakers.into_iter().for_each(Waker::wake);
    drop(told); // Nobody has asked for these.
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::task::Wake;

    use super::*;

    struct Bell;

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {}
    }

    fn ask(standing: &mut Standing) -> Bidding {
        let waker = Waker::from(Arc::new(Bell));
        standing.ask(&Context::from_waker(&waker))
    }

    #[test]
    fn f25_given_a_worker_that_finds_several_orders_at_once_when_the_first_ends_then_the_last_one_holds() {
        let (mut told, mut untold) = (Standing::default(), Standing::default());
        begin_round();
        assert_eq!((ask(&mut told), ask(&mut untold)), (Bidding::Wait, Bidding::Wait));
        STAGE.set(Stage::Tell);
        let telling = Begun::now();
        assert_eq!(ask(&mut told), Bidding::Tell);
        told = Standing::Told(ROUND.get());

        begin_leaving(); // Before what ends the telling has run.
        let leaving = Begun::now();
        telling.be_still();
        assert!(leaving.lasts(), "nobody has ended it");
        wake_with(Stage::Flow);

        assert_eq!(
            (ask(&mut told), ask(&mut told)),
            (Bidding::Leave, Bidding::Leave),
            "it is another process's for good"
        );
        assert_eq!(ask(&mut untold), Bidding::Move);
        begin_round();
        let resting = Begun::now();
        assert_eq!(ask(&mut untold), Bidding::Wait);
        go_on();
        resting.be_still();
        assert_eq!(ask(&mut untold), Bidding::Move, "nobody is left waiting");
    }

    /// The stages on a thread of their own, without a worker.
    fn at(stage: Stage, standing: &mut Standing) -> Bidding {
        STAGE.set(stage);
        ask(standing)
    }

    fn tell_nothing(standing: &mut Standing) {
        let waker = Waker::from(Arc::new(Bell));
        standing.tell(&Context::from_waker(&waker), None);
    }

    #[test]
    fn given_nothing_to_hand_over_when_a_relay_asks_then_it_moves() {
        let mut standing = Standing::default();

        assert_eq!((ask(&mut standing), standing), (Bidding::Move, Standing::Flowing));
    }

    #[test]
    fn f25_given_a_relay_at_a_standstill_when_it_is_woken_in_between_then_it_moves_nothing_until_all_goes_on() {
        let mut standing = Standing::default();

        begin_round();
        assert_eq!((ask(&mut standing), ask(&mut standing)), (Bidding::Wait, Bidding::Wait));
        assert_eq!(at(Stage::Still, &mut standing), Bidding::Wait);
        assert_eq!(RESTING.with_borrow(|resting| resting.wakers.len()), 1);
        assert_eq!(at(Stage::Leave, &mut standing), Bidding::Wait, "it has not told");
        go_on();

        assert_eq!((ask(&mut standing), standing), (Bidding::Move, Standing::Flowing));
    }

    #[test]
    fn f25_given_a_relay_that_has_not_moved_since_the_last_standstill_when_the_next_begins_then_it_is_known_there() {
        let mut standing = Standing::default();
        let resting = || RESTING.with_borrow(|resting| resting.wakers.len());
        begin_round();
        assert_eq!(ask(&mut standing), Bidding::Wait);
        standing = Standing::Told(ROUND.get());
        go_on(); // Both orders come in one turn: nobody was polled in between.
        begin_round();

        assert_eq!((ask(&mut standing), ask(&mut standing)), (Bidding::Wait, Bidding::Wait));

        assert_eq!((resting(), standing.is_told()), (1, false));
        go_on();
    }

    #[test]
    fn f25_given_a_relay_that_cannot_tell_or_came_late_when_the_others_leave_then_it_goes_on() {
        let (mut unable, mut late) = (Standing::default(), Standing::default());
        begin_round();
        assert_eq!(ask(&mut unable), Bidding::Wait);

        assert_eq!(at(Stage::Still, &mut late), Bidding::Move);
        assert_eq!(at(Stage::Tell, &mut unable), Bidding::Tell);
        tell_nothing(&mut unable);
        assert_eq!(at(Stage::Still, &mut unable), Bidding::Wait, "it is asked once more");
        assert_eq!(RESTING.with_borrow(|resting| resting.wakers.len()), 2);
        assert_eq!(at(Stage::Tell, &mut unable), Bidding::Tell);
        tell_nothing(&mut unable);

        for stage in [Stage::Tell, Stage::Still, Stage::Leave, Stage::Flow] {
            assert_eq!((at(stage, &mut unable), at(stage, &mut late)), (Bidding::Move, Bidding::Move));
        }
        go_on();
    }
}
