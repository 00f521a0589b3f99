//! The terminal of `top`, from the first picture to the last: it is as it was before whatever ends it.
//!
//! A thread waits for keys, a task asks the relay, and one loop draws. Where a panic ends it, ratatui's hook gives the
//! terminal back before the message is written. While it is stopped (Ctrl-Z) the terminal is the shell's, and it is taken
//! again when it goes on.

use std::io;
use std::net::SocketAddr;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode};
use ratatui::prelude::CrosstermBackend;
use ratatui::{DefaultTerminal, Terminal};
use rustix::process::{Signal as Sign, kill_current_process_group};
use tokio::select;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::reading::{CloseReading, Reading};
use super::view::{Key, Outcome};
use super::{Top, TopOptions, screen};
use crate::name::ObjectName;
use crate::peer;

/// How often the thread of the keyboard looks whether anybody listens.
const KEYBOARD_PATIENCE: Duration = Duration::from_millis(100);
/// How long the keyboard's thread may take to see that nobody listens: what reads keys never returns where the terminal is
/// gone, and that thread ends with the process then.
const KEYBOARD_END: Duration = Duration::from_secs(1);
/// How long it takes to be stopped at most. Where nobody could have it go on, it is not stopped at all.
const STOP_PATIENCE: Duration = Duration::from_millis(200);
/// How often the time since the last answer is shown anew.
const TICK: Duration = Duration::from_secs(1);
/// The relay spends no more than one part of so many on answers: a large one is asked less often,
const ANSWER_SHARE: u32 = 20;
/// but never less often than this: it may be the way there that is slow.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

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
    let signals = |source| SessionError::Signals { source };
    let mut ends = Ends::catch().map_err(signals)?;
    let mut resumed = signal(SignalKind::from_raw(Sign::CONT.as_raw())).map_err(signals)?;
    let mut answers = Answers::ask(options.server, options.interval, top.wanted());
    let mut screen = Screen::open().map_err(terminal)?;
    let mut keyboard = Keyboard::listen().map_err(terminal)?;
    loop {
        let page = screen.draw(&mut top).map_err(terminal)?;
        select! {
            biased;
            () = ends.next() => return Ok(()),
            // Stopped by somebody else: the shell has had the terminal meanwhile.
            _ = resumed.recv() => screen.take_again().map_err(terminal)?,
            event = keyboard.next() => {
                let key = key_of(&event.map_err(terminal)?);
                match key.map(|key| top.press(key, page)) {
                    Some(Outcome::Quit) => return Ok(()),
                    Some(Outcome::Suspend) => suspend(&mut screen, &mut resumed).await.map_err(terminal)?,
                    Some(Outcome::Stay) | None => {}
                }
                answers.want(top.wanted());
            }
            answer = answers.next() => match answer.ok_or(SessionError::Asker)? {
                (Answer::All(reading), at) => top.hear(reading, at),
                (Answer::One(name, reading), at) => top.hear_closely(&name, reading, at),
                (Answer::None(why), at) => top.miss(why, at),
            },
            () = sleep(TICK) => {}
        }
    }
}

/// Stops as every program does at Ctrl-Z, which a terminal in raw mode tells as a key: all of the pipeline, for the shell to
/// see. Returns once it goes on.
async fn suspend(screen: &mut Screen, resumed: &mut Signal) -> io::Result<()> {
    screen.give_back();
    kill_current_process_group(Sign::TSTP)?;
    // The stop comes within microseconds, on whichever thread. There is none where no shell could end it.
    let _ = timeout(STOP_PATIENCE, resumed.recv()).await;
    screen.take_again()
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

impl Screen {
    fn give_back(&mut self) {
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore(); // Where the terminal is gone nothing is to be put right.
    }

    /// After somebody else had the terminal, or might have had it.
    fn take_again(&mut self) -> io::Result<()> {
        ratatui::try_restore()?; // Else it counts as raw already, whatever others have made of it.
        enable_raw_mode()?;
        execute!(io::stdout(), EnterAlternateScreen)?;
        self.0 = Terminal::new(CrosstermBackend::new(io::stdout()))?; // One that knows of nothing drawn.
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // After a panic the hook has done it: once more would erase its message.
        if !thread::panicking() {
            self.give_back();
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
    thread: JoinHandle<()>,
}

impl Keyboard {
    fn listen() -> io::Result<Self> {
        let (sender, events) = mpsc::channel(64);
        let thread = thread::Builder::new().name("keyboard".into()).spawn(move || read_keys(&sender))?;
        Ok(Self { events, thread })
    }

    async fn next(&mut self) -> io::Result<Event> {
        self.events.recv().await.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()))
    }
}

impl Drop for Keyboard {
    /// What is typed from now on is for whoever has the terminal next.
    fn drop(&mut self) {
        self.events.close();
        let begun = Instant::now();
        while !self.thread.is_finished() && begun.elapsed() < KEYBOARD_END {
            thread::sleep(KEYBOARD_PATIENCE / 10);
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
        return match code {
            KeyCode::Char('c') => Some(Key::Interrupt),
            KeyCode::Char('z') => Some(Key::Suspend),
            _ => None,
        };
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
    answers: mpsc::Receiver<(Answer, Instant)>,
    wanted: watch::Sender<Option<ObjectName>>,
    _asker: AbortOnDropHandle<()>,
}

/// What came of a question.
enum Answer {
    /// A line about each Service.
    All(Reading),
    /// One Service with its backends; `None` where there is none of that name.
    One(ObjectName, Option<CloseReading>),
    /// Nothing: why.
    None(String),
}

impl Answers {
    /// Asks for all, and for the one that is wanted, again and again.
    fn ask(server: SocketAddr, interval: Duration, wanted: Option<ObjectName>) -> Self {
        let ((sender, answers), (wanted, of_asker)) = (mpsc::channel(1), watch::channel(wanted));
        let asker = Asker { server, interval, wanted: of_asker, answers: sender };
        Self { answers, wanted, _asker: AbortOnDropHandle::new(tokio::spawn(asker.run())) }
    }

    /// Has it ask for this one besides all, the first time at once.
    fn want(&self, name: Option<ObjectName>) {
        self.wanted.send_if_modified(|wanted| {
            let is_another = *wanted != name;
            *wanted = name;
            is_another
        });
    }

    async fn next(&mut self) -> Option<(Answer, Instant)> {
        self.answers.recv().await
    }
}

/// Asks. Owned by its task.
struct Asker {
    server: SocketAddr,
    interval: Duration,
    wanted: watch::Receiver<Option<ObjectName>>,
    answers: mpsc::Sender<(Answer, Instant)>,
}

impl Asker {
    /// Until nobody listens.
    async fn run(mut self) {
        loop {
            let begun = Instant::now();
            let all = self.ask_for_all().await;
            let is_away = matches!(all, Answer::None(_));
            if !self.tell(all, begun).await || !is_away && !self.ask_for_one().await {
                return;
            }
            // A relay that is away, or hangs, is to be seen as soon as it is back.
            let pause = if is_away { self.interval } else { pause(self.interval, begun.elapsed()) };
            let pause = sleep(pause);
            tokio::pin!(pause);
            loop {
                select! {
                    biased;
                    changed = self.wanted.changed() => if changed.is_err() || !self.ask_for_one().await { return },
                    () = &mut pause => break,
                }
            }
        }
    }

    async fn ask_for_all(&self) -> Answer {
        match peer::summary(self.server).await {
            Ok(summary) => Answer::All(Reading::of(summary)),
            Err(error) => Answer::None(error.to_string()),
        }
    }

    /// Asks for the Service that is wanted, if any. False where nobody listens.
    async fn ask_for_one(&mut self) -> bool {
        let Some(name) = self.wanted.borrow_and_update().clone() else { return true };
        let begun = Instant::now();
        let answer = match peer::closeup(self.server, &name).await {
            Ok(closeup) => Answer::One(name, closeup.as_ref().map(CloseReading::of)),
            Err(error) => Answer::None(error.to_string()),
        };
        self.tell(answer, begun).await
    }

    async fn tell(&self, answer: Answer, begun: Instant) -> bool {
        self.answers.send((answer, begun)).await.is_ok()
    }
}

/// How long to wait after an answer that took so long.
fn pause(interval: Duration, took: Duration) -> Duration {
    interval.saturating_sub(took).max(took.saturating_mul(ANSWER_SHARE - 1).min(LONGEST_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_answers_that_take_long_when_asked_again_then_the_relay_has_nineteen_times_as_long_to_rest() {
        let [interval, quick, slow] = [2_000, 10, 500].map(Duration::from_millis);

        assert_eq!(pause(interval, quick), Duration::from_millis(1_990));
        assert_eq!(pause(interval, slow), Duration::from_millis(9_500));
        assert_eq!(pause(interval, Duration::MAX), LONGEST_PAUSE, "it was stopped meanwhile, say");
        assert_eq!(pause(2 * LONGEST_PAUSE, quick), 2 * LONGEST_PAUSE - quick);
    }

    #[test]
    fn given_events_when_read_then_keys_are_told_and_the_rest_is_not() {
        let press = |code, modifiers| Event::Key(KeyEvent::new(code, modifiers));
        let release = KeyEvent::new_with_kind(KeyCode::Up, KeyModifiers::NONE, KeyEventKind::Release);

        assert_eq!(key_of(&press(KeyCode::Char('c'), KeyModifiers::CONTROL)), Some(Key::Interrupt));
        assert_eq!(key_of(&press(KeyCode::Char('z'), KeyModifiers::CONTROL)), Some(Key::Suspend));
        assert_eq!(key_of(&press(KeyCode::Char('x'), KeyModifiers::CONTROL)), None);
        assert_eq!(key_of(&press(KeyCode::Char('S'), KeyModifiers::SHIFT)), Some(Key::Char('S')));
        assert_eq!(key_of(&press(KeyCode::Esc, KeyModifiers::NONE)), Some(Key::Escape));
        assert_eq!(key_of(&Event::Key(release)), None);
        assert_eq!(key_of(&Event::Resize(40, 10)), None);
    }
}
