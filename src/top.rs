//! `kube-relay top`: which Service of a running kube-relay does what, as a table that moves.
//!
//! Here is what it shows at a moment, what a key does to that, and the one answer of `top --once`. All of it is pure but
//! the asking, which is `peer`'s: for a line about each Service, and for the backends of the one that is looked at. What was
//! answered is a [`mod@reading`], two of them make rates in [`board`], [`order`] and [`view`] are how the reader sees them,
//! [`mod@column`] what a row says, [`plain`] the text without a screen; `screen` draws, and `session` has the terminal.

pub mod board;
pub mod column;
pub mod history;
pub mod order;
pub mod plain;
pub mod reading;
#[cfg(feature = "tui")]
mod screen;
#[cfg(feature = "tui")]
mod session;
pub mod view;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

#[cfg(feature = "tui")]
pub use session::{SessionError, run};

use crate::name::ObjectName;
use crate::peer::{self, AskError};
use board::{Board, Closeup, ServiceLine};
use order::{Sort, arranged};
use reading::{CloseReading, Reading};
use view::{Key, Outcome, Place, View};

/// Time between two questions, unless told otherwise.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(2);
/// The shortest time between two questions: who looks needs no more, and each answer costs the relay something.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(200);

/// What to ask, and how to show it at first.
#[derive(Clone, Debug)]
pub struct TopOptions {
    /// The `--status-bind-address` of a running kube-relay.
    pub server: SocketAddr,
    /// Time from one question to the next; longer where answers take long.
    pub interval: Duration,
    /// What the Services are sorted by.
    pub sort: Sort,
    /// Words that a Service has to have; empty: all Services.
    pub filter: String,
    /// One Service with its backends, in place of all.
    pub service: Option<ObjectName>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum OnceError {
    /// The relay did not answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// It has no such Service.
    #[error("{server}: there is no Service {name}")]
    NoService {
        /// Who was asked.
        server: SocketAddr,
        /// What was asked for.
        name: ObjectName,
    },
}

/// The table as text, once: two questions, and the rates between them.
///
/// # Errors
/// Nobody answers, or there is no such Service.
pub async fn once(options: &TopOptions) -> Result<String, OnceError> {
    let mut top = Top::new(options);
    ask(&mut top).await?;
    tokio::time::sleep(options.interval).await;
    ask(&mut top).await?;
    match (plain::text(&top), &options.service) {
        (Some(text), _) => Ok(text),
        (None, Some(name)) => Err(OnceError::NoService { server: options.server, name: name.clone() }),
        (None, None) => Ok(String::new()),
    }
}

async fn ask(top: &mut Top) -> Result<(), AskError> {
    let begun = Instant::now();
    top.hear(Reading::of(peer::summary(top.server).await?), begun);
    if let Some(name) = top.wanted() {
        let begun = Instant::now();
        let closeup = peer::closeup(top.server, &name).await?;
        top.hear_closely(&name, closeup.as_ref().map(CloseReading::of), begun);
    }
    Ok(())
}

/// How the relay does that is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// It has not answered yet.
    #[default]
    Waiting,
    /// It has answered the last question.
    Up,
    /// It has not, for so long; what is shown is what it said before.
    Away {
        /// Of the first question without an answer.
        since: Instant,
        /// Of the last one.
        why: String,
    },
}

/// All that is shown, at one moment.
#[derive(Debug)]
pub struct Top {
    /// Who is asked.
    pub server: SocketAddr,
    /// What it said, with rates.
    pub board: Board,
    /// Whether it still says something.
    pub link: Link,
    /// Where the reader is in it.
    pub view: View,
    /// The Services that are shown, as places in the board, in their order.
    pub services: Vec<usize>,
}

impl Top {
    /// Nothing was heard yet.
    pub fn new(options: &TopOptions) -> Self {
        Self {
            server: options.server,
            board: Board::default(),
            link: Link::Waiting,
            view: View::new(options.sort, &options.filter, options.service.as_ref()),
            services: Vec::new(),
        }
    }

    /// The relay has answered.
    pub fn hear(&mut self, reading: Reading, at: Instant) {
        self.link = Link::Up;
        if !self.view.paused {
            self.board.take(reading, at);
            self.arrange();
        }
    }

    /// The relay has answered about one Service; `None`: it has none of that name. What is looked at for the first time is
    /// shown though nothing moves.
    pub fn hear_closely(&mut self, name: &ObjectName, reading: Option<CloseReading>, at: Instant) {
        let name = reading::printable(&name.to_string());
        if self.view.service.as_ref() == Some(&name) && (!self.view.paused || self.closeup().is_none()) {
            self.board.take_closely(&name, reading, at);
            self.arrange();
        }
    }

    /// The Service that is to be asked for, besides the lines about all.
    pub fn wanted(&self) -> Option<ObjectName> {
        self.view.service.as_deref().map(ObjectName::parse)
    }

    /// The relay has not answered.
    pub fn miss(&mut self, why: String, at: Instant) {
        let since = match self.link {
            Link::Away { since, .. } => since,
            Link::Waiting | Link::Up => at,
        };
        self.link = Link::Away { since, why: reading::printable(&why) };
    }

    /// A key was pressed while so many rows were in sight.
    pub fn press(&mut self, key: Key, page: usize) -> Outcome {
        let place = match self.view.service {
            None => Place { count: self.services.len(), page, selected: self.selected_service().map(str::to_owned) },
            Some(_) => Place { count: self.backend_count(), page, selected: None },
        };
        let outcome = self.view.press(key, &place);
        if self.view.service.is_none() {
            self.board.closeup = None; // Nobody asks for it any more: it would be old when it is opened again.
        }
        self.arrange();
        outcome
    }

    /// The line of the Service that is looked at alone; `None` where all are, and where it is gone.
    pub fn service(&self) -> Option<&ServiceLine> {
        let name = self.view.service.as_deref()?;
        self.board.services.iter().find(|service| service.reading.name == name)
    }

    /// That Service with its backends; `None` where all are looked at, and before the relay has answered.
    pub fn closeup(&self) -> Option<&Closeup> {
        let name = self.view.service.as_deref()?;
        self.board.closeup.as_ref().filter(|closeup| closeup.name == name)
    }

    fn backend_count(&self) -> usize {
        self.closeup().map_or(0, |closeup| closeup.backends.len())
    }

    fn selected_service(&self) -> Option<&str> {
        let place = *self.services.get(self.view.services.row)?;
        self.board.services.get(place).map(|service| service.reading.name.as_str())
    }

    /// Puts rows in their order, and keeps each cursor at what it was at.
    fn arrange(&mut self) {
        let View { sort, reversed, filter, .. } = &self.view;
        self.services = arranged(&self.board.services, *sort, *reversed, filter);
        let name = |row: usize| {
            let place = *self.services.get(row)?;
            self.board.services.get(place).map(|service| service.reading.name.as_str())
        };
        let wanted = self.view.services.name.as_deref();
        let row = wanted.and_then(|wanted| (0..self.services.len()).find(|row| name(*row) == Some(wanted)));
        self.view.services.settle(row, self.services.len());
        let name = self.selected_service().map(str::to_owned);
        self.view.services.keep(name);
        let count = self.backend_count();
        self.view.backends.settle(None, count);
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::live::sample;
    use crate::status::Status;
    use crate::summary::{self, Summary};

    fn options() -> TopOptions {
        TopOptions {
            server: SocketAddr::from(([127, 0, 0, 1], 10249)),
            interval: DEFAULT_INTERVAL,
            sort: Sort::Name,
            filter: String::new(),
            service: None,
        }
    }

    fn reading(status: &Status) -> Reading {
        Reading::of(Summary::of(status, UNIX_EPOCH))
    }

    /// Has it asked for what it wants.
    fn look_closely(top: &mut Top) {
        let name = top.wanted().expect("one Service is looked at");
        let closeup = summary::Closeup::of(&sample::status(), &name, UNIX_EPOCH);
        top.hear_closely(&name, closeup.as_ref().map(CloseReading::of), Instant::now());
    }

    fn names(top: &Top) -> Vec<&str> {
        top.services.iter().map(|place| top.board.services[*place].reading.name.as_str()).collect()
    }

    #[test]
    fn given_services_when_heard_of_then_they_are_in_their_order_and_a_filter_leaves_some() {
        let mut top = Top::new(&options());

        top.hear(reading(&sample::status()), Instant::now());
        assert_eq!(names(&top), ["default/dns", "default/headless", "default/web"]);
        top.view.filter = "WEB nodeport".into();
        top.arrange();

        assert_eq!(names(&top), ["default/web"]);
    }

    #[test]
    fn given_a_selected_service_when_the_order_changes_then_the_cursor_stays_with_it() {
        let mut top = Top::new(&options());
        top.hear(reading(&sample::status()), Instant::now());
        top.press(Key::Down, 10);
        top.press(Key::Down, 10);
        assert_eq!(top.selected_service(), Some("default/web"));

        top.press(Key::Char('r'), 10);

        assert_eq!(names(&top)[0], "default/web");
        assert_eq!((top.selected_service(), top.view.services.row), (Some("default/web"), 0));
    }

    #[test]
    fn given_a_selected_service_when_it_goes_then_the_cursor_stays_in_the_list() {
        let mut top = Top::new(&options());
        let mut status = sample::status();
        top.hear(reading(&status), Instant::now());
        top.press(Key::End, 10);

        status.services.retain(|name, _| &*name.name != "web");
        top.hear(reading(&status), Instant::now());

        assert_eq!(top.selected_service(), Some("default/headless"));
        status.services.clear();
        top.hear(reading(&status), Instant::now());
        assert_eq!((top.selected_service(), top.view.services.row), (None, 0));
        assert_eq!(top.press(Key::Enter, 10), Outcome::Stay);
    }

    #[test]
    fn given_one_service_when_opened_and_left_then_its_backends_come_and_go() {
        let mut top = Top::new(&options());
        top.hear(reading(&sample::status()), Instant::now());
        top.press(Key::End, 10);

        top.press(Key::Enter, 10);
        assert_eq!(top.service().map(|service| service.reading.name.as_str()), Some("default/web"));
        assert_eq!(top.backend_count(), 0, "it was not asked for yet");
        look_closely(&mut top);
        assert_eq!(top.backend_count(), 2);
        top.press(Key::Down, 10);
        assert_eq!(top.view.backends.row, 1);

        assert_eq!(top.press(Key::Escape, 10), Outcome::Stay);
        assert!(top.service().is_none() && top.wanted().is_none() && top.board.closeup.is_none());
        assert_eq!(top.press(Key::Escape, 10), Outcome::Quit);
    }

    #[test]
    fn given_an_answer_about_a_service_that_was_left_when_heard_then_it_is_nobodys() {
        let mut top = Top::new(&options());
        top.hear(reading(&sample::status()), Instant::now());

        top.hear_closely(&ObjectName::parse("web"), Some(CloseReading::default()), Instant::now());

        assert!(top.board.closeup.is_none());
    }

    #[test]
    fn given_a_service_that_is_gone_when_looked_at_then_that_is_known_and_there_is_no_line() {
        let mut top = Top::new(&TopOptions { service: Some(ObjectName::parse("shop/nobody")), ..options() });
        top.hear(reading(&sample::status()), Instant::now());

        look_closely(&mut top);

        assert!(top.service().is_none() && top.closeup().is_some_and(|closeup| !closeup.is_there));
    }

    #[test]
    fn given_a_relay_that_goes_when_missed_twice_then_it_is_away_since_the_first_time_until_it_is_back() {
        let mut top = Top::new(&options());
        let (first, second) = (Instant::now(), Instant::now() + Duration::from_secs(2));

        top.miss("nothing answers".into(), first);
        top.miss("still \u{1b}[31mnothing".into(), second);
        assert_eq!(top.link, Link::Away { since: first, why: "still \u{fffd}[31mnothing".into() });
        top.hear(reading(&sample::status()), second);

        assert_eq!(top.link, Link::Up);
    }

    #[test]
    fn given_a_pause_when_something_is_heard_then_what_is_shown_stays() {
        let mut top = Top::new(&options());
        top.hear(reading(&sample::status()), Instant::now());
        top.press(Key::Char('p'), 10);

        top.hear(reading(&Status::default()), Instant::now());
        assert_eq!(top.services.len(), 3);
        top.press(Key::End, 10);
        top.press(Key::Enter, 10);
        look_closely(&mut top);
        assert_eq!(top.backend_count(), 2, "what is opened was never shown");
        top.press(Key::Char('p'), 10);
        top.hear(reading(&Status::default()), Instant::now());

        assert!(top.services.is_empty());
    }
}
