//! Log output: who reads it decides the form. Text for a person at a terminal, JSON for a collector.
//!
//! Logs go to standard error, by way of `log_queue`; standard output belongs to the answers of commands.

use std::io::{self, IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

pub use crate::log_queue::LastWords;
use crate::log_queue::LogQueue;

/// How to log. From `--log-level` and `--log-format`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// What to log: a level, or `target=level` pairs as in `RUST_LOG`.
    pub level: LogLevel,
    /// In which form.
    pub format: LogFormat,
}

/// What to log, checked when it was read: `info`, or `info,kube_relay::serve=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLevel(String);

impl std::str::FromStr for LogLevel {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        EnvFilter::builder().parse(text).map(|_| Self(text.to_owned()))
    }
}

impl std::fmt::Display for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text where standard error is a terminal, JSON otherwise
    #[default]
    Auto,
    /// A line for people
    Text,
    /// An object for each line
    Json,
}

/// What we say in our own words, once: the client of the API server logs each failure, with all that it was sent.
const OWN_WORDS: &str = "kube_client=off,kube_runtime=off";

/// Sends all logs of this process to standard error, by a thread of their own. A second call changes nothing.
///
/// Nobody waits for whoever reads there; what is said last is written before the result is dropped.
///
/// # Errors
/// Where the system gives no thread.
pub fn start(options: &LogOptions) -> io::Result<LastWords> {
    let terminal = stderr().is_terminal();
    // Cannot fail: the text was parsed before. If it did, errors alone would be logged.
    let filter = EnvFilter::builder().parse_lossy(format!("{OWN_WORDS},{}", options.level.0));
    let format = options.format.resolve(terminal);
    let (queue, last_words) = LogQueue::start(stderr(), format == LogFormat::Json)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(queue).with_target(false);
    // An error here means that somebody who embeds us logs already: their choice stands.
    let _ = match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
        LogFormat::Auto | LogFormat::Text => builder.with_ansi(terminal && !no_color()).try_init(),
    };
    Ok(last_words)
}

impl LogFormat {
    fn resolve(self, terminal: bool) -> Self {
        match self {
            Self::Auto if terminal => Self::Text,
            Self::Auto => Self::Json,
            chosen => chosen,
        }
    }
}

/// The convention of no-color.org.
fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_auto_when_stderr_is_a_terminal_then_text_else_json() {
        assert_eq!(LogFormat::Auto.resolve(true), LogFormat::Text);
        assert_eq!(LogFormat::Auto.resolve(false), LogFormat::Json);
        assert_eq!(LogFormat::Text.resolve(false), LogFormat::Text);
        assert_eq!(LogFormat::Json.resolve(true), LogFormat::Json);
    }

    #[test]
    fn given_log_levels_when_read_then_directives_pass_and_nonsense_does_not() {
        for good in ["info", "debug,hyper=warn", "kube_relay::serve=trace"] {
            assert_eq!(good.parse::<LogLevel>().expect("a filter").to_string(), good);
        }
        assert!("kube_relay=loud".parse::<LogLevel>().is_err());
    }
}
