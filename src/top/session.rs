//! The terminal of `top`, from the first picture to the last: it is as it was before whatever ends it.
//!
//! A thread waits for keys, a task asks the relay, and one loop draws. Where a panic ends it, ratatui's hook gives the
//! terminal back before the message is written.

use std::io;
use std::net::SocketAddr;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::select;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::reading::Reading;
use super::view::{Key, Outcome};
use super::{Top, TopOptions, screen};
use crate::peer;

/// How often the thread of the keyboard looks whether anybody listens.
const KEYBOARD_PATIENCE: Duration = Duration::from_millis(100);
/// How often the time since the last answer is shown anew.
const TICK: Duration = Duration::from_secs(1);
/// The relay spends no more than one part of so many on answers: a large one is asked less often.
const ANSWER_SHARE: u32 = 20;

/// Why it ended before the reader wanted.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The terminal does not do what is asked of it.
    #[error("the terminal cannot be used (`top --once` needs none)")]
    Terminal {
        /// What the system said.
        source: io::Error,
    },
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals {
        /// What the system said.
        source: io::Error,
    },
    /// The task that asks is gone.
    #[error("the task that asks the relay has ended")]
    Asker,
}

fn terminal(source: io::Error) -> SessionError {
    SessionError::Terminal { source }
}

/// Shows the table until the reader, or a signal, ends it. Wants a runtime of two threads: answers can be long.
///
/// # Errors
/// The terminal cannot be used, or goes away.
pub async fn run(options: &TopOptions) -> Result<(), SessionError> {
    let mut top = Top::new(options);
    let mut ends = Ends::catch().map_err(|source| SessionError::Signals { source })?;
    let mut answers = Answers::ask(options.server, options.interval);
    let mut screen = Screen::open().map_err(terminal)?;
    let mut keyboard = Keyboard::listen().map_err(terminal)?;
    loop {
        let page = screen.draw(&mut top).map_err(terminal)?;
        select! {
            biased;
            () = ends.next() => return Ok(()),
            event = keyboard.next() => {
                let key = key_of(&event.map_err(terminal)?);
                if key.is_some_and(|key| top.press(key, page) == Outcome::Quit) {
                    return Ok(());
                }
            }
            answer = answers.next() => match answer.ok_or(SessionError::Asker)? {
                (Ok(reading), at) => top.hear(reading, at),
                (Err(why), at) => top.miss(why, at),
            },
            () = sleep(TICK) => {}
        }
    }
}

/// A terminal that shows our pictures. Dropped, it is as it was.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                let _ = ratatui::try_restore(); // It may have come half way.
                Err(error)
            }
        }
    }

    /// Tells how many rows of the list are in sight.
    fn draw(&mut self, top: &mut Top) -> io::Result<usize> {
        let mut page = 0;
        self.0.draw(|frame| page = screen::draw(frame, top, Instant::now()))?;
        Ok(page)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // After a panic the hook has done it: once more would erase its message.
        if !thread::panicking() {
            let _ = self.0.show_cursor();
            let _ = ratatui::try_restore(); // Where the terminal is gone nothing is to be put right.
        }
    }
}

/// The signals that end it.
struct Ends([Signal; 3]);

impl Ends {
    fn catch() -> io::Result<Self> {
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// What is typed, as it comes.
struct Keyboard {
    events: mpsc::Receiver<io::Result<Event>>,
    thread: Option<JoinHandle<()>>,
}

impl Keyboard {
    fn listen() -> io::Result<Self> {
        let (sender, events) = mpsc::channel(64);
        let thread = thread::Builder::new().name("keyboard".into()).spawn(move || read_keys(&sender))?;
        Ok(Self { events, thread: Some(thread) })
    }

    async fn next(&mut self) -> io::Result<Event> {
        self.events.recv().await.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
    }
}

impl Drop for Keyboard {
    /// What is typed from now on is for whoever has the terminal next.
    fn drop(&mut self) {
        self.events.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // A panic of it was told already.
        }
    }
}

fn read_keys(sender: &mpsc::Sender<io::Result<Event>>) {
    while !sender.is_closed() {
        let event = match event::poll(KEYBOARD_PATIENCE) {
            Ok(false) => continue,
            Ok(true) => event::read(),
            Err(error) => Err(error),
        };
        let is_last = event.is_err();
        if sender.blocking_send(event).is_err() || is_last {
            return;
        }
    }
}

/// The key of an event; others, like another size, only have it drawn anew.
fn key_of(event: &Event) -> Option<Key> {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press | KeyEventKind::Repeat, .. }) = event else {
        return None;
    };
    if modifiers.contains(KeyModifiers::CONTROL) {
        return (*code == KeyCode::Char('c')).then_some(Key::Interrupt);
    }
    Some(match code {
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Backspace => Key::Backspace,
        KeyCode::Char(c) => Key::Char(*c),
        _ => return None,
    })
}

/// What a relay says, as it comes.
struct Answers {
    answers: mpsc::Receiver<(Result<Reading, String>, Instant)>,
    _asker: AbortOnDropHandle<()>,
}

impl Answers {
    fn ask(server: SocketAddr, interval: Duration) -> Self {
        let (sender, answers) = mpsc::channel(1);
        let asker = tokio::spawn(async move {
            loop {
                let begun = Instant::now();
                let answer = peer::status(server).await.map(Reading::of).map_err(|error| error.to_string());
                if sender.send((answer, begun)).await.is_err() {
                    return;
                }
                sleep(pause(interval, begun.elapsed())).await;
            }
        });
        Self { answers, _asker: AbortOnDropHandle::new(asker) }
    }

    async fn next(&mut self) -> Option<(Result<Reading, String>, Instant)> {
        self.answers.recv().await
    }
}

/// How long to wait after an answer that took so long.
fn pause(interval: Duration, took: Duration) -> Duration {
    interval.saturating_sub(took).max(took * (ANSWER_SHARE - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_answers_that_take_long_when_asked_again_then_the_relay_has_nineteen_times_as_long_to_rest() {
        let [interval, quick, slow] = [2_000, 10, 500].map(Duration::from_millis);

        assert_eq!(pause(interval, quick), Duration::from_millis(1_990));
        assert_eq!(pause(interval, slow), Duration::from_millis(9_500));
    }

    #[test]
    fn given_events_when_read_then_keys_are_told_and_the_rest_is_not() {
        let press = |code, modifiers| Event::Key(KeyEvent::new(code, modifiers));
        let release = KeyEvent::new_with_kind(KeyCode::Up, KeyModifiers::NONE, KeyEventKind::Release);

        assert_eq!(key_of(&press(KeyCode::Char('c'), KeyModifiers::CONTROL)), Some(Key::Interrupt));
        assert_eq!(key_of(&press(KeyCode::Char('z'), KeyModifiers::CONTROL)), None);
        assert_eq!(key_of(&press(KeyCode::Char('S'), KeyModifiers::SHIFT)), Some(Key::Char('S')));
        assert_eq!(key_of(&press(KeyCode::Esc, KeyModifiers::NONE)), Some(Key::Escape));
        assert_eq!(key_of(&Event::Key(release)), None);
        assert_eq!(key_of(&Event::Resize(40, 10)), None);
    }
}
