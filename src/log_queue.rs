//! The way of a log line from whoever says it to whoever reads it: a queue with an end, and a thread that writes.
//!
//! Nobody who says something waits for a reader. A terminal that is held, or a collector that has stopped, costs lines,
//! which are counted, and no time. And one place in the data plane says ten lines a second at most, however many
//! connections fail there. What a line looks like is `logs`.

use std::io::{self, Write};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

use crate::serve::few_lines::FewLines;
use crate::stats::PROCESS;

/// Lines that wait for a reader: many times what a start says at once, and mostly some 300 KiB.
const LINES: usize = 1_024;
/// Bytes after which none more may wait, however few lines they are: what is told of an object may be as long as that.
const BYTES: usize = 1 << 20;
/// From one try to the next at an output that takes nothing now and makes nobody wait: another process may have it so.
const PAUSE: Duration = Duration::from_millis(5);

/// How long the end of the process waits for the reader.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Whose lines are kept to a few: what says something once for each connection. Others tell of changes, which have limits
/// of their own.
const DATA_PLANE: &str = "kube_relay::serve";

/// Where all threads put their lines. Owned by the subscriber that formats them.
pub(crate) struct LogQueue {
    lines: SyncSender<Vec<u8>>,
    backlog: Arc<Backlog>,
    sites: Sites,
    is_json: bool,
}

/// What is on its way, and what got lost there.
#[derive(Debug, Default)]
struct Backlog {
    /// Bytes that are not written yet.
    waiting: AtomicUsize,
    /// Since the last line for which there was room.
    dropped: AtomicU64,
}

/// Waits, when dropped, for up to a second until all that was said is written.
#[derive(Debug)]
#[must_use = "what is said last may be lost without it"]
pub struct LastWords {
    backlog: Arc<Backlog>,
}

impl LogQueue {
    /// Starts the thread that writes lines to `output`: JSON objects, or text.
    pub(crate) fn start(output: impl Write + Send + 'static, is_json: bool) -> io::Result<(Self, LastWords)> {
        let (lines, queue) = sync_channel(LINES);
        let backlog = Arc::<Backlog>::default();
        let last_words = LastWords { backlog: Arc::clone(&backlog) };
        let write = {
            let backlog = Arc::clone(&backlog);
            move || write_out(&queue, output, &backlog)
        };
        thread::Builder::new().name("log".to_owned()).spawn(write)?;
        Ok((Self { lines, backlog, sites: Sites::new(), is_json }, last_words))
    }

    /// Puts a line in the queue, and says with it how many there were before it that nobody will read.
    fn tell(&self, line: &[u8], suppressed: u64) {
        let dropped = self.backlog.dropped.swap(0, Ordering::Relaxed);
        let line = self.with_losses(line, [("suppressed", suppressed), ("dropped", dropped)]);
        if !self.enqueue(line) {
            self.backlog.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
            PROCESS.log_lines_dropped.unread.increment();
        }
    }

    /// False where there is no room.
    fn enqueue(&self, line: Vec<u8>) -> bool {
        let bytes = line.len();
        // Threads that come at once may each be let in: a line each more.
        let has_room = self.backlog.waiting.fetch_add(bytes, Ordering::Relaxed) < BYTES;
        let enqueued = has_room && self.lines.try_send(line).is_ok();
        if !enqueued {
            self.backlog.waiting.fetch_sub(bytes, Ordering::Relaxed);
        }
        enqueued
    }

    /// The line with a field more for each that is not zero.
    fn with_losses(&self, line: &[u8], losses: [(&str, u64); 2]) -> Vec<u8> {
        let end: &[u8] = if self.is_json { b"}\n" } else { b"\n" };
        let mut told = line.to_vec();
        for (name, count) in losses.into_iter().filter(|(_, count)| *count > 0) {
            // What ends otherwise is not ours, and stays as it is.
            let Some(whole) = told.strip_suffix(end) else { break };
            let field = if self.is_json { format!(",\"{name}\":{count}") } else { format!(" {name}={count}") };
            told = [whole, field.as_bytes(), end].concat();
        }
        told
    }
}

/// Ends with the queue.
fn write_out(lines: &Receiver<Vec<u8>>, mut output: impl Write, backlog: &Backlog) {
    while let Ok(line) = lines.recv() {
        if write_whole(&mut output, &line).is_err() {
            // The other end is closed, or the disk is full: whoever reads there cannot be told.
            PROCESS.log_lines_dropped.unread.increment();
        }
        backlog.waiting.fetch_sub(line.len(), Ordering::Relaxed);
    }
}

/// Waits for as long as the output takes nothing.
fn write_whole(output: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match output.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => line = line.get(written..).unwrap_or_default(),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
                _ => return Err(error),
            },
        }
    }
    Ok(())
}

impl<'q> MakeWriter<'q> for LogQueue {
    type Writer = Line<'q>;

    fn make_writer(&'q self) -> Line<'q> {
        Line { queue: self, suppressed: Some(0) }
    }

    fn make_writer_for(&'q self, site: &Metadata<'_>) -> Line<'q> {
        Line { queue: self, suppressed: self.sites.ask(site, Instant::now()) }
    }
}

/// Takes one line, which comes in one piece.
pub(crate) struct Line<'q> {
    queue: &'q LogQueue,
    /// How many lines of the same place were not told since the last one; `None`: this is not to be told either.
    suppressed: Option<u64>,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.suppressed {
            Some(suppressed) => self.queue.tell(line, suppressed),
            None => PROCESS.log_lines_dropped.storm.increment(),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LastWords {
    /// True once nothing waits any more; false after so long.
    fn wait(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        while self.backlog.waiting.load(Ordering::Relaxed) > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for LastWords {
    fn drop(&mut self) {
        self.wait(LAST_WORDS);
    }
}

/// Places in the data plane that say something: more than there are.
const SITES: usize = 256;

/// How often each place has said something lately. Without a lock: workers ask.
struct Sites {
    slots: Box<[Slot]>,
}

struct Slot {
    /// Where the place's description is in memory, which is there for ever and as no other; 0 while the slot is free.
    site: AtomicUsize,
    lines: FewLines,
}

impl Sites {
    fn new() -> Self {
        let slot = || Slot { site: AtomicUsize::new(0), lines: FewLines::new() };
        Self { slots: std::iter::repeat_with(slot).take(SITES).collect() }
    }

    /// Whether a place may say something now, and how often it was not allowed to since it last did.
    fn ask(&self, site: &Metadata<'_>, now: Instant) -> Option<u64> {
        if !site.target().starts_with(DATA_PLANE) {
            return Some(0);
        }
        self.slot_of(ptr::from_ref(site).addr()).map_or(Some(0), |slot| slot.lines.ask(now))
    }

    /// The slot of a place; `None` where others have taken all: then nothing is kept back.
    fn slot_of(&self, site: usize) -> Option<&Slot> {
        let first = site / size_of::<Metadata<'_>>();
        (0..SITES).map(|step| &self.slots[(first + step) % SITES]).find(|slot| slot.is_of(site))
    }
}

impl Slot {
    /// True where it is that place's, from now on if it was free.
    fn is_of(&self, site: usize) -> bool {
        match self.site.compare_exchange(0, site, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => true,
            Err(owner) => owner == site,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// What a thread reads to the end.
    fn reading(mut output: impl Read + Send + 'static) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut text = String::new();
            output.read_to_string(&mut text).expect("text");
            text
        })
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn f30_given_nobody_who_reads_when_more_is_said_than_fits_then_nobody_waits_and_what_is_lost_is_told() {
        const LONG: usize = BYTES / 2; // More than a pipe holds: its writer is stuck.
        let (mut output, input) = io::pipe().expect("a pipe");
        let (queue, last_words) = LogQueue::start(input, false).expect("a thread starts");
        queue.tell(&[vec![b'-'; LONG], b"\n".to_vec()].concat(), 0);
        output.read_exact(&mut [0]).expect("it is being written: the queue is empty");

        (0..2 * LINES).for_each(|_| queue.tell(b"line\n", 0));

        assert_eq!(queue.backlog.dropped.load(Ordering::Relaxed), LINES as u64);
        assert!(PROCESS.log_lines_dropped.unread.get() >= LINES as u64);
        assert!(!last_words.wait(Duration::ZERO));
        let read = reading(output);
        assert!(last_words.wait(PATIENCE), "somebody reads");
        queue.tell(b"after it\n", 0);
        drop(queue);
        let text = read.join().expect("it does not panic");
        assert_eq!(text.lines().count(), 1 + LINES + 1);
        assert!(text.ends_with(&format!("line\nafter it dropped={LINES}\n")));
    }

    #[test]
    fn f30_given_a_storm_in_the_data_plane_when_it_is_logged_then_ten_lines_a_second_are_and_others_are_all() {
        let (output, input) = io::pipe().expect("a pipe");
        let (queue, last_words) = LogQueue::start(input, true).expect("a thread starts");
        let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_writer(queue).finish();
        let read = reading(output);

        let begin = Instant::now();
        tracing::subscriber::with_default(subscriber, || {
            (0..500).for_each(|_| tracing::warn!(target: "kube_relay::serve::tests", "in the storm"));
            (0..50).for_each(|_| tracing::warn!(target: "kube_relay::control", "beside it"));
        });
        let seconds = begin.elapsed().as_secs() as usize;

        assert!(last_words.wait(PATIENCE), "somebody reads");
        let text = read.join().expect("it does not panic");
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
        let of = |message: &str| lines.iter().filter(|line| line["message"] == message).count();
        assert!((10..=10 * (seconds + 2)).contains(&of("in the storm")), "{text}");
        assert_eq!(of("beside it"), 50);
    }

    #[test]
    fn f30_given_long_lines_and_nobody_who_reads_when_they_are_a_mebibyte_then_no_more_of_them_wait() {
        const LONG: usize = BYTES / 4;
        let (output, input) = io::pipe().expect("a pipe");
        let (queue, last_words) = LogQueue::start(input, false).expect("a thread starts");

        (0..10).for_each(|_| queue.tell(&vec![b'-'; LONG], 0));

        assert_eq!(queue.backlog.dropped.load(Ordering::Relaxed), 6, "one is being written, and three wait");
        let read = reading(output);
        assert!(last_words.wait(PATIENCE), "somebody reads");
        drop(queue);
        assert_eq!(read.join().expect("it does not panic").len(), 4 * LONG);
    }

    /// Takes nothing twice, then a few bytes at a time, and ends for good behind some of them.
    struct Reluctant {
        taken: std::sync::mpsc::Sender<Vec<u8>>,
        refusals: u32,
        left: usize,
    }

    impl Write for Reluctant {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            const AT_ONCE: usize = 3;
            if self.refusals > 0 {
                self.refusals -= 1;
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let count = bytes.len().min(AT_ONCE).min(self.left);
            self.left -= count;
            self.taken.send(bytes[..count].to_vec()).expect("the test listens");
            if count == 0 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(count) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn f30_given_an_output_that_will_not_wait_when_lines_are_told_then_they_are_whole_and_what_is_lost_is_counted() {
        let (taken, took) = std::sync::mpsc::channel();
        let before = PROCESS.log_lines_dropped.unread.get();
        let output = Reluctant { taken, refusals: 2, left: 10 };
        let (queue, last_words) = LogQueue::start(output, false).expect("a thread starts");

        queue.tell(b"whole one\n", 0);
        queue.tell(b"lost one\n", 0);

        assert!(last_words.wait(PATIENCE), "it ends");
        drop(queue);
        assert_eq!(took.into_iter().flatten().collect::<Vec<_>>(), b"whole one\n");
        assert!(PROCESS.log_lines_dropped.unread.get() > before);
    }

    #[test]
    fn given_losses_when_a_line_is_told_then_it_says_so_at_its_end_and_is_what_it_was() {
        let told = |is_json: bool, line: &str, losses: [u64; 2]| {
            let (queue, _last_words) = LogQueue::start(io::sink(), is_json).expect("a thread starts");
            let losses = [("suppressed", losses[0]), ("dropped", losses[1])];
            String::from_utf8(queue.with_losses(line.as_bytes(), losses)).expect("text")
        };

        assert_eq!(told(false, "INFO ready\n", [0, 0]), "INFO ready\n");
        assert_eq!(told(false, "INFO ready\n", [3, 4]), "INFO ready suppressed=3 dropped=4\n");
        assert_eq!(told(true, "{\"a\":{}}\n", [3, 0]), "{\"a\":{},\"suppressed\":3}\n");
        assert_eq!(told(true, "no object", [3, 4]), "no object");
    }

    #[test]
    fn given_more_places_than_slots_when_asked_for_then_each_has_its_own_or_none() {
        let sites = Sites::new();

        let taken: Vec<_> = (1..=SITES).map(|site| sites.slot_of(site * 4_096).map(ptr::from_ref)).collect();
        let again: Vec<_> = (1..=SITES).map(|site| sites.slot_of(site * 4_096).map(ptr::from_ref)).collect();

        assert!(taken.iter().all(Option::is_some));
        assert_eq!(taken, again);
        assert_eq!(taken.iter().collect::<std::collections::BTreeSet<_>>().len(), SITES);
        assert!(sites.slot_of(7).is_none());
    }
}
