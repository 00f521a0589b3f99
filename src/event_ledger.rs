//! Which news is told to the cluster, when, and how often: few Events, and there as long as they are true.
//!
//! Pure: the time is an argument. What is news is `event_news`; who tells it, and how, `events`.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::event_news::{Regarding, Topic};

/// Tellings that may follow each other at once; then one in [`PACE`].
const BURST: u32 = 10;
/// Time in which one more may follow. [`REFRESH`] has room for all of [`LIMIT`]: what is new does not wait for what lasts.
const PACE: Duration = Duration::from_secs(30);
/// Topics that are known at one time. Those of the Node are few, and always have room.
const LIMIT: usize = 50;
/// From a telling of a topic to the next with another note or count. The first count comes at once: it shows that it is not over.
const AGAIN: Duration = Duration::from_secs(60);
/// How often an Event of ours is told that it lasts: servers forget after an hour what nobody touches.
const REFRESH: Duration = Duration::from_secs(30 * 60);
/// How often it is looked whether an Event that was there before us is still there, and sixty times the delay more: all nodes
/// look. One that nobody renews any more, as its relay has started anew, may be missing for that long.
const ANOTHERS: Duration = Duration::from_secs(60 * 60);
/// How long an Event of something that has ended is known, so that it is the same one where it comes back.
const MEMORY: Duration = Duration::from_secs(60 * 60);
/// Nothing is told for this long after a telling without an answer; twice as long after each further one, up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_secs(30);
const MAX_PAUSE: Duration = Duration::from_secs(8 * 60);
/// Nothing is told for this long where the server takes no Events of ours: somebody has to change a role first.
const REFUSED_PAUSE: Duration = Duration::from_secs(60 * 60);

/// Something that a person should know now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct News {
    /// What it is about.
    pub(crate) topic: Topic,
    /// A sentence for a person, with the remedy.
    pub(crate) note: String,
    /// When it began, came back, or had another note.
    pub(crate) since: Instant,
}

/// What is to be told now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As an Event that is not there yet, as far as we know.
    Create(News),
    /// That an Event of ours was seen so often by now.
    Count {
        /// What it says.
        news: News,
        /// Its name.
        event: String,
        /// At least 2.
        count: u32,
    },
}

impl Order {
    /// What is told.
    pub(crate) fn news(&self) -> &News {
        match self {
            Self::Create(news) | Self::Count { news, .. } => news,
        }
    }

    fn count(&self) -> u32 {
        match self {
            Self::Create(_) => 1,
            Self::Count { count, .. } => *count,
        }
    }
}

/// How telling went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// There is an Event of ours, with this name.
    Told(String),
    /// There is one already, of another relay or from before a restart: its count is not ours.
    Known,
    /// The server takes others, but not this one.
    Rejected,
    /// The Event that was to be counted is gone.
    Forgotten,
    /// The object is gone, and with it the news.
    Gone,
    /// The server takes no Events from us.
    Refused,
    /// The server did not answer, or not now.
    Away,
}

/// What was told, and what waits. Owned by the task that tells, by value.
#[derive(Debug)]
pub(crate) struct Ledger {
    entries: BTreeMap<Topic, Entry>,
    /// How long news has to last before it is told.
    delay: Duration,
    /// When all of [`BURST`] are free again.
    full_at: Instant,
    /// Nothing is told before.
    pause_until: Instant,
    /// Tellings without an answer, one after the other.
    failures: u32,
}

/// What is known of a topic.
#[derive(Debug)]
struct Entry {
    note: String,
    /// As in [`News`].
    since: Instant,
    /// How often it was seen: when it began, when it came back, and each time that it was told that it lasts.
    count: u32,
    /// False once it has ended.
    lasts: bool,
    told: Option<Told>,
}

/// An Event that is there, or that the server does not take.
#[derive(Debug)]
struct Told {
    /// `None` where it is not ours.
    event: Option<String>,
    note: String,
    count: u32,
    at: Instant,
}

impl Entry {
    fn new(note: String, now: Instant) -> Self {
        Self { note, since: now, count: 1, lasts: true, told: None }
    }

    fn see(&mut self, note: String, now: Instant) {
        if !self.lasts {
            self.count = self.count.saturating_add(1);
            self.since = now;
        }
        if self.note != note {
            (self.note, self.count, self.since) = (note, 1, now);
        }
        self.lasts = true;
    }

    /// When there is something to tell; `None` where there is nothing.
    fn due(&self, delay: Duration) -> Option<Instant> {
        let ready = self.since + delay;
        let due = match &self.told {
            None => ready,
            Some(told) if told.note != self.note => ready.max(told.at + AGAIN),
            Some(Told { event: None, at, .. }) => *at + ANOTHERS + delay * 60,
            Some(Told { count: 1, .. }) if self.count > 1 => ready,
            Some(told) if told.count < self.count => ready.max(told.at + AGAIN),
            Some(told) => told.at + REFRESH,
        };
        self.lasts.then_some(due)
    }

    fn order(&self, topic: &Topic) -> Order {
        let news = News { topic: topic.clone(), note: self.note.clone(), since: self.since };
        match &self.told {
            Some(Told { event: Some(event), note, count, .. }) if *note == self.note => {
                Order::Count { news, event: event.clone(), count: self.count.max(count.saturating_add(1)) }
            }
            _ => Order::Create(news),
        }
    }

    fn is_over(&self, now: Instant) -> bool {
        !self.lasts && self.told.as_ref().is_none_or(|told| told.at + MEMORY <= now)
    }
}

impl Ledger {
    /// Nothing was told yet. `delay`: how long news has to last before it is told.
    pub(crate) fn new(delay: Duration, now: Instant) -> Self {
        Self { entries: BTreeMap::new(), delay, full_at: now, pause_until: now, failures: 0 }
    }

    /// Takes all that there is to know now; what is not among it has ended. The number of topics that there is no room for.
    pub(crate) fn observe(&mut self, notes: BTreeMap<Topic, String>, now: Instant) -> usize {
        for (topic, entry) in &mut self.entries {
            entry.lasts = entry.lasts && notes.contains_key(topic);
        }
        // What has ended before it was told is no news any more.
        self.entries.retain(|_, entry| !entry.is_over(now));
        notes.into_iter().map(|(topic, note)| usize::from(!self.take_in(topic, note, now))).sum()
    }

    /// False where there is no room.
    fn take_in(&mut self, topic: Topic, note: String, now: Instant) -> bool {
        if let Some(entry) = self.entries.get_mut(&topic) {
            entry.see(note, now);
            return true;
        }
        if self.entries.len() >= LIMIT {
            self.forget_one();
        }
        let fits = self.entries.len() < LIMIT || matches!(topic.regarding, Regarding::Node(_));
        if fits {
            self.entries.insert(topic, Entry::new(note, now));
        }
        fits
    }

    /// What has ended makes room, the one first that was told longest ago.
    fn forget_one(&mut self) {
        let ended = self.entries.iter().filter(|(_, entry)| !entry.lasts);
        let oldest = ended.min_by_key(|(_, entry)| entry.told.as_ref().map(|told| told.at));
        if let Some(topic) = oldest.map(|(topic, _)| topic.clone()) {
            self.entries.remove(&topic);
        }
    }

    /// When the next order may be taken; `None` where there is nothing to tell.
    pub(crate) fn due(&self, now: Instant) -> Option<Instant> {
        let due = self.entries.values().filter_map(|entry| entry.due(self.delay)).min()?;
        Some(due.max(self.next_turn(now)))
    }

    /// What is to be told now: first what was not told yet, then the oldest; `None` where nothing is due.
    pub(crate) fn take(&mut self, now: Instant) -> Option<Order> {
        if self.next_turn(now) > now {
            return None;
        }
        let due = self.entries.iter().filter_map(|(topic, entry)| Some((entry.due(self.delay)?, topic, entry)));
        let due = due.filter(|(due, ..)| *due <= now);
        let (_, topic, entry) = due.min_by_key(|(due, _, entry)| (entry.told.is_some(), *due))?;
        let order = entry.order(topic);
        self.full_at = self.full_at.max(now) + PACE;
        Some(order)
    }

    /// Notes how an order went.
    pub(crate) fn settle(&mut self, order: &Order, outcome: Outcome, now: Instant) {
        let (topic, failures) = (&order.news().topic, std::mem::take(&mut self.failures));
        match outcome {
            Outcome::Told(event) => self.remember(order, Some(event), now),
            Outcome::Known | Outcome::Rejected => self.remember(order, None, now),
            Outcome::Forgotten => {
                if let Some(entry) = self.entries.get_mut(topic) {
                    entry.told = None;
                }
            }
            Outcome::Gone => drop(self.entries.remove(topic)),
            Outcome::Refused => self.pause_until = now + REFUSED_PAUSE,
            Outcome::Away => {
                self.pause_until = now + MAX_PAUSE.min(PAUSE * 2_u32.saturating_pow(failures));
                self.failures = failures.saturating_add(1);
            }
        }
    }

    fn remember(&mut self, order: &Order, event: Option<String>, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&order.news().topic) {
            let (note, count) = (order.news().note.clone(), order.count());
            entry.count = count; // A new Event begins anew.
            entry.told = Some(Told { event, note, count, at: now });
        }
    }

    /// When one more may be told.
    fn next_turn(&self, now: Instant) -> Instant {
        let (next_full, horizon) = (self.full_at.max(now) + PACE, now + PACE * BURST);
        self.pause_until.max(now + next_full.saturating_duration_since(horizon))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_news::Reason;
    use crate::name::ObjectName;

    const DELAY: Duration = Duration::from_secs(5);
    const SECOND: Duration = Duration::from_secs(1);

    fn of_service(number: usize) -> Topic {
        let regarding = Regarding::Service(ObjectName::new("default", format!("web-{number}")));
        Topic { regarding, reason: Reason("PortConflict", "Serve") }
    }

    /// A ledger, and the clock that it goes by.
    struct Desk {
        ledger: Ledger,
        now: Instant,
    }

    impl Desk {
        /// Tells at once.
        fn hasty() -> Self {
            Self::waiting(Duration::ZERO)
        }

        fn waiting(delay: Duration) -> Self {
            let now = Instant::now();
            Self { ledger: Ledger::new(delay, now), now }
        }

        /// Nothing is wrong but what these Services have.
        fn observe(&mut self, notes: &[(usize, &str)]) -> usize {
            let notes = notes.iter().map(|(number, note)| (of_service(*number), (*note).to_owned()));
            self.ledger.observe(notes.collect(), self.now)
        }

        /// So many Services have something.
        fn observe_many(&mut self, services: usize) -> usize {
            let notes = (0..services).map(|number| (of_service(number), "a".to_owned()));
            self.ledger.observe(notes.collect(), self.now)
        }

        /// Tells all that may be told now; the server takes everything.
        fn tell(&mut self) -> Vec<Order> {
            let mut orders = Vec::new();
            while let Some(order) = self.ledger.take(self.now) {
                self.ledger.settle(&order, Outcome::Told("event".into()), self.now);
                orders.push(order);
            }
            orders
        }

        /// As `note of a new one` or `xCOUNT`.
        fn told(&mut self) -> Vec<String> {
            let text = |order| match order {
                Order::Create(news) => news.note,
                Order::Count { count, event, .. } => {
                    assert_eq!(event, "event");
                    format!("x{count}")
                }
            };
            self.tell().into_iter().map(text).collect()
        }

        fn one(&mut self) -> Order {
            self.ledger.take(self.now).expect("it may be told")
        }

        fn settle(&mut self, order: &Order, outcome: Outcome) {
            self.ledger.settle(order, outcome, self.now);
        }

        /// Seconds from now.
        fn due(&self) -> Option<u64> {
            self.ledger.due(self.now).map(|due| due.saturating_duration_since(self.now).as_secs())
        }
    }

    #[test]
    fn given_news_when_it_lasts_then_it_is_told_after_the_delay_with_the_time_of_its_begin() {
        let mut desk = Desk::waiting(DELAY);
        desk.observe(&[(1, "a")]);
        let begin = desk.now;
        assert_eq!((desk.due(), desk.told()), (Some(5), vec![]));

        desk.now += DELAY;

        let news = News { topic: of_service(1), note: "a".into(), since: begin };
        assert_eq!(desk.tell(), [Order::Create(news)]);
    }

    #[test]
    fn given_news_that_ends_within_the_delay_when_due_then_nobody_is_told() {
        let mut desk = Desk::waiting(DELAY);
        desk.observe(&[(1, "a")]);
        desk.now += SECOND;

        desk.observe(&[]);

        assert_eq!(desk.due(), None);
        desk.now += DELAY;
        assert!(desk.told().is_empty());
        assert!(desk.ledger.entries.is_empty());
    }

    #[test]
    fn given_what_comes_back_all_the_time_when_told_then_it_is_one_event_with_a_count_at_once_and_then_each_minute() {
        let mut desk = Desk::hasty();
        let mut told = Vec::new();

        for second in 0..=130 {
            desk.observe(if second % 2 == 0 { &[(1, "a")] } else { &[] });
            told.extend(desk.told().into_iter().map(|text| (second, text)));
            desk.now += SECOND;
        }

        assert_eq!(told, [(0, "a"), (2, "x2"), (62, "x32"), (122, "x62")].map(|(at, text)| (at, text.to_owned())));
    }

    #[test]
    fn given_what_lasts_when_hours_pass_then_its_event_is_kept_alive_by_its_count() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a")]);
        assert_eq!(desk.told(), ["a"]);

        for count in 2..6 {
            assert_eq!(desk.due(), Some(30 * 60));
            desk.now += REFRESH;
            desk.observe(&[(1, "a")]);
            assert_eq!(desk.told(), [format!("x{count}")]);
        }
        desk.observe(&[]);

        assert_eq!(desk.due(), None);
    }

    #[test]
    fn given_another_note_for_the_same_when_told_then_it_is_an_event_of_its_own_once_a_minute() {
        let mut desk = Desk::hasty();
        let mut told = Vec::new();

        for second in 0..=150 {
            desk.observe(&[(1, if second % 20 < 10 { "a" } else { "b" })]);
            told.extend(desk.told().into_iter().map(|text| (second, text)));
            desk.now += SECOND;
        }

        assert_eq!(told, [(0, "a"), (70, "b"), (140, "a")].map(|(at, text)| (at, text.to_owned())));
    }

    #[test]
    fn given_ten_thousand_services_at_once_when_told_then_ten_are_and_one_in_half_a_minute_and_fifty_are_kept() {
        let mut desk = Desk::hasty();

        assert_eq!(desk.observe_many(10_000), 10_000 - LIMIT);

        assert_eq!(desk.tell().len(), 10);
        assert_eq!(desk.due(), Some(30));
        desk.now += PACE - Duration::from_millis(1);
        assert!(desk.tell().is_empty());
        desk.now += Duration::from_millis(1);
        assert_eq!(desk.tell().len(), 1);
        desk.now += 5 * PACE;
        assert_eq!(desk.tell().len(), 5);
        assert_eq!(desk.ledger.entries.len(), LIMIT);
    }

    #[test]
    fn given_all_that_is_kept_when_it_lasts_then_each_event_is_touched_within_the_hour_and_what_is_new_comes_first() {
        let mut desk = Desk::hasty();
        desk.observe_many(LIMIT - 1);
        let mut touched = BTreeMap::new();
        for _ in 0..3 * 60 * 2 {
            for order in desk.tell() {
                let before = touched.insert(order.news().topic.clone(), desk.now);
                assert!(before.is_none_or(|before| desk.now - before < MEMORY), "the server has forgotten it");
            }
            desk.now += PACE;
        }
        assert_eq!(touched.len(), LIMIT - 1);

        desk.observe_many(LIMIT);

        assert_eq!(desk.one().news().topic, of_service(LIMIT - 1));
    }

    #[test]
    fn given_a_full_ledger_when_something_ends_then_it_makes_room_and_the_node_has_room_anyway() {
        let mut desk = Desk::hasty();
        desk.observe_many(LIMIT);
        desk.tell();
        let node = Topic { regarding: Regarding::Node("here".into()), reason: Reason("FailedToListen", "Listen") };
        let all = |numbers: std::ops::Range<usize>| numbers.map(|number| (of_service(number), "a".to_owned()));

        assert_eq!(desk.observe_many(LIMIT + 1), 1);
        assert_eq!(desk.ledger.observe(all(0..LIMIT).chain([(node.clone(), "a".into())]).collect(), desk.now), 0);
        assert!(desk.ledger.entries.contains_key(&node));

        assert_eq!(desk.ledger.observe(all(1..LIMIT + 1).collect(), desk.now), 0);
        assert!(!desk.ledger.entries.contains_key(&of_service(0)));
    }

    #[test]
    fn f1_given_a_server_that_is_away_when_told_then_it_is_told_later_and_ever_later() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a")]);
        let mut waits = Vec::new();

        for _ in 0..7 {
            let order = desk.one();
            desk.settle(&order, Outcome::Away);
            let wait = desk.due().expect("not given up");
            waits.push(wait);
            assert_eq!(desk.ledger.take(desk.now), None);
            desk.now += Duration::from_secs(wait);
        }

        assert_eq!(waits, [30, 60, 120, 240, 480, 480, 480]);
        assert_eq!(desk.told(), ["a"]);
        desk.observe(&[(1, "a"), (2, "b")]);
        let order = desk.one();
        desk.settle(&order, Outcome::Away);
        assert_eq!(desk.due(), Some(30), "an answer ends the patience");
    }

    #[test]
    fn given_a_server_that_takes_no_events_when_told_then_it_is_left_alone_for_an_hour() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a"), (2, "b")]);
        let order = desk.one();

        desk.settle(&order, Outcome::Refused);

        assert_eq!(desk.due(), Some(60 * 60));
        desk.now += REFUSED_PAUSE;
        assert_eq!(desk.told(), ["a", "b"]);
    }

    #[test]
    fn given_an_event_of_another_relay_when_it_comes_back_or_lasts_then_its_count_is_left_to_that_one() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a")]);
        let order = desk.one();
        desk.settle(&order, Outcome::Known);
        desk.observe(&[]);
        desk.observe(&[(1, "a")]);

        assert_eq!(desk.due(), Some(60 * 60));

        desk.now += ANOTHERS;
        assert_eq!(desk.told(), ["a"], "that one may be gone");
    }

    #[test]
    fn given_an_event_that_is_gone_when_counted_then_it_is_made_anew() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a")]);
        desk.tell();
        desk.now += REFRESH;
        let order = desk.one();
        assert!(matches!(order, Order::Count { count: 2, .. }));

        desk.settle(&order, Outcome::Forgotten);

        assert_eq!(desk.told()[0], "a");
    }

    #[test]
    fn given_an_object_that_is_gone_when_told_of_then_nothing_of_it_is_known_any_more() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a")]);
        let order = desk.one();

        desk.settle(&order, Outcome::Gone);

        assert_eq!(desk.due(), None);
    }

    #[test]
    fn given_one_event_that_the_server_does_not_take_when_others_wait_then_they_are_told() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a"), (2, "b")]);
        let order = desk.one();

        desk.settle(&order, Outcome::Rejected);

        assert_eq!(desk.told(), ["b"]);
    }

    #[test]
    fn given_what_ended_an_hour_ago_when_something_is_observed_then_it_is_forgotten() {
        let mut desk = Desk::hasty();
        desk.observe(&[(1, "a")]);
        desk.tell();
        desk.observe(&[]);
        assert_eq!(desk.ledger.entries.len(), 1, "it may come back");

        desk.now += MEMORY;
        desk.observe(&[]);

        assert!(desk.ledger.entries.is_empty());
    }
}
