//! What the first answer over a UDP flow's socket will tell, and whose address the flow shows until it comes.
//!
//! Pure: what is known of ways back is in `way_back`, sockets are opened in `shard`.
//!
//! ```text
//! client's ──asks again after 0.3 s, then after twice what was waited──▶ node's     a minute at most
//!    ▲                                                                     │
//!    └────────── asks again after 0.3 s, and nothing speaks against it ────┘
//! ```

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::serve::preserve::Side;
use crate::serve::way_back::{ClientKey, DOUBT, Evidence, TRUST, Tells};

/// Of a flow whose client's address is to be preserved, and that has had no answer over its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Doubt {
    /// On which side the client is.
    pub(super) side: Side,
    /// True where the backend sees the client's address, false where it sees this node's.
    pub(super) as_client: bool,
    /// Of whom an answer tells.
    pub(super) of: ClientKey,
    /// When the socket was opened.
    since: Instant,
    /// How long the client's address may be silent; while this node's is seen, next time.
    patience: Duration,
    /// While this node's is seen: how long a client's had been silent. Zero: nothing follows from an answer.
    waited: Duration,
}

/// A [`Doubt`] as a plain value, for another process. Without it, a flow whose backend cannot answer its client would be silent
/// for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DoubtRecord {
    side: Side,
    as_client: bool,
    of: ClientKey,
    age: Duration,
    patience: Duration,
    waited: Duration,
}

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// There is a way back.
    WayBack,
    /// There is none for this client, with how much of that is evidence.
    NoWayBack(ClientKey, Evidence),
    /// The backend answers this node.
    AnswersNode,
}

impl Doubt {
    /// Of a flow that shows its client from now on.
    pub(super) fn of_client(side: Side, client: ClientKey, now: Instant) -> Self {
        Self { side, as_client: true, of: client, since: now, patience: DOUBT, waited: Duration::ZERO }
    }

    /// Of a flow that begins at this node's address.
    pub(super) fn of_node(side: Side, tells: Tells, now: Instant) -> Self {
        let Tells { of, waited } = tells;
        Self { side, as_client: false, of, since: now, patience: DOUBT, waited }
    }

    /// What becomes of it where its client asks again; `None` where it stays. `is_missing`: all are served from the node's
    /// address by now.
    pub(super) fn moved(self, client: ClientKey, is_missing: bool, now: Instant) -> Option<Self> {
        let waited = now.saturating_duration_since(self.since);
        if waited < DOUBT || self.as_client && waited < self.patience && !is_missing {
            return None;
        }
        Some(if self.as_client {
            let patience = (waited * 2).clamp(DOUBT, TRUST);
            Self { as_client: false, of: client, since: now, patience, waited, ..self }
        } else {
            Self { as_client: true, of: client, since: now, waited: Duration::ZERO, ..self }
        })
    }

    /// As it is, for as long again.
    pub(super) fn again(self, now: Instant) -> Self {
        Self { since: now, ..self }
    }

    /// What another process needs of it.
    pub(super) fn record(self, now: Instant) -> DoubtRecord {
        let Self { side, as_client, of, since, patience, waited } = self;
        DoubtRecord { side, as_client, of, age: now.saturating_duration_since(since), patience, waited }
    }

    /// The same, of a flow that has come from another process.
    pub(super) fn go_on(record: DoubtRecord, now: Instant) -> Self {
        let DoubtRecord { side, as_client, of, age, patience, waited } = record;
        Self { side, as_client, of, since: now.checked_sub(age).unwrap_or(now), patience, waited }
    }

    /// What an answer says that has come now.
    pub(super) fn answered(self, now: Instant) -> Said {
        if self.as_client {
            return Said::WayBack;
        }
        if self.waited.is_zero() {
            return Said::AnswersNode;
        }
        let is_sooner = now.saturating_duration_since(self.since) < self.waited / 2;
        Said::NoWayBack(self.of, if is_sooner { Evidence::Clear } else { Evidence::Late })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    const TEN_MINUTES: Duration = Duration::from_secs(600);

    fn client(number: u8) -> ClientKey {
        ClientKey::of(Ipv4Addr::new(203, 0, 113, number).into())
    }

    fn begun(now: Instant) -> Doubt {
        Doubt::of_client(Side::sample(), client(1), now)
    }

    /// How often a flow changes its address that sends in such steps and is never answered.
    fn changes(steps: impl Iterator<Item = Duration>) -> usize {
        let start = Instant::now();
        let (mut doubt, mut now, mut changes) = (begun(start), start, 0);
        for step in steps {
            now += step;
            if now - start > TEN_MINUTES {
                break;
            }
            if let Some(next) = doubt.moved(client(1), false, now) {
                assert_ne!(next.as_client, doubt.as_client);
                (doubt, changes) = (next, changes + 1);
            }
        }
        changes
    }

    #[test]
    fn given_a_flow_that_nobody_answers_when_it_goes_on_for_ten_minutes_then_it_shows_its_client_nearly_always() {
        let start = Instant::now();
        let (mut doubt, mut as_node) = (begun(start), Duration::ZERO);
        let step = Duration::from_millis(10);

        for number in 1..=60_000 {
            doubt = doubt.moved(client(1), false, start + step * number).unwrap_or(doubt);
            as_node += if doubt.as_client { Duration::ZERO } else { step };
        }

        assert!(changes(std::iter::repeat(step)) <= 36);
        assert!(as_node < TEN_MINUTES / 100, "{as_node:?}");
    }

    #[test]
    fn given_answers_when_they_are_judged_then_what_was_waited_decides() {
        let (start, waited) = (Instant::now(), Duration::from_secs(2));
        let as_node = begun(start).moved(client(1), false, start + waited).expect("its time is over");
        let said = |after| as_node.answered(start + waited + after);

        assert_eq!(begun(start).answered(start + waited), Said::WayBack);
        assert_eq!(said(waited / 2 - Duration::from_millis(1)), Said::NoWayBack(client(1), Evidence::Clear));
        assert_eq!(said(waited / 2), Said::NoWayBack(client(1), Evidence::Late));
    }

    #[test]
    fn given_a_flow_that_begins_at_the_node_when_it_is_answered_then_it_tells_of_who_asked_where_that_ones_time_is_over()
     {
        let now = Instant::now();
        let of_node = |waited| Doubt::of_node(Side::sample(), Tells { of: client(2), waited }, now);

        assert_eq!(of_node(Duration::ZERO).answered(now), Said::AnswersNode);
        assert_eq!(of_node(DOUBT).answered(now), Said::NoWayBack(client(2), Evidence::Clear));
        let moved = of_node(DOUBT).moved(client(1), false, now + DOUBT).expect("its time is over");
        assert!(moved.as_client);
        let back = moved.moved(client(1), false, now + DOUBT * 2).expect("its time is over");
        assert_eq!(back.answered(now + DOUBT * 2), Said::NoWayBack(client(1), Evidence::Clear), "of its own client");
    }

    #[test]
    fn given_a_patient_flow_when_others_find_that_there_is_no_way_back_then_it_moves_with_its_next_datagram() {
        let start = Instant::now();
        let patient = Doubt { patience: TRUST, ..begun(start) };

        assert_eq!(patient.moved(client(1), false, start + TRUST / 2), None);
        assert!(patient.moved(client(1), true, start + DOUBT).is_some_and(|doubt| !doubt.as_client));
        assert_eq!(patient.moved(client(1), true, start + DOUBT / 2), None, "a round trip is left to it");
    }

    #[test]
    fn given_a_flow_that_could_not_move_when_its_client_asks_again_then_it_waits_as_long_once_more() {
        let start = Instant::now();
        let again = begun(start).again(start + DOUBT);

        assert_eq!(again.moved(client(1), false, start + DOUBT + DOUBT / 2), None);
        assert!(again.moved(client(1), false, start + DOUBT * 2).is_some());
    }

    #[test]
    fn f25_given_a_doubt_of_another_process_when_it_goes_on_then_it_is_as_old_and_about_the_same() {
        let start = Instant::now();
        let doubt = begun(start).moved(client(2), false, start + TRUST).expect("its time is over");
        let now = start + TRUST + DOUBT;

        let text = serde_json::to_string(&doubt.record(now)).expect("JSON");
        let record = serde_json::from_str(&text).expect("JSON");

        assert_eq!(Doubt::go_on(record, now), doubt);
    }

    proptest! {
        #[test]
        fn given_any_pace_when_nobody_answers_then_addresses_change_seldom(
            steps in prop::collection::vec(1_u64..20_000, 1..2_000),
        ) {
            prop_assert!(changes(steps.into_iter().map(Duration::from_millis)) <= 40);
        }
    }
}
