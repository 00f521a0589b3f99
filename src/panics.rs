//! Panics: each is a fault of ours, which ends one task and is told where somebody will see it.
//!
//! The log says where it was, with the way there, once for each place; the metric counts all. Who catches the panic
//! says what it has ended.

use std::any::Any;
use std::backtrace::Backtrace;
use std::collections::HashSet;
use std::panic::{self, PanicHookInfo};
use std::sync::{Mutex, PoisonError};
use std::thread;

use tracing::error;

use crate::stats::PROCESS;

/// Has panics of all threads logged and counted (`kuberelay_panics_total`), in place of the text that Rust prints.
pub fn log_and_count() {
    let told = Mutex::new(HashSet::new());
    panic::set_hook(Box::new(move |info| {
        PROCESS.panics.increment();
        let place = info.location().map_or_else(|| "?".to_owned(), ToString::to_string);
        // Held for the look-up alone: what follows may panic as well.
        let is_news = told.lock().unwrap_or_else(PoisonError::into_inner).insert(place.clone());
        if is_news {
            tell(info, &place, &Backtrace::force_capture());
        }
    }));
}

fn tell(info: &PanicHookInfo<'_>, place: &str, backtrace: &Backtrace) {
    let message = message_of(info.payload());
    let current = thread::current();
    let thread = current.name().unwrap_or("?");
    error!(place, thread, %backtrace, "panic: {message}: please report it");
}

fn message_of(payload: &dyn Any) -> &str {
    match payload.downcast_ref::<&str>() {
        Some(message) => message,
        None => payload.downcast_ref::<String>().map_or("no message", String::as_str),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f35_given_a_thread_that_panics_when_logged_then_it_is_counted_and_others_go_on() {
        let before = PROCESS.panics.get();
        let outer = panic::take_hook();
        log_and_count();

        let outcomes: Vec<_> = (0..2).map(|_| thread::spawn(|| panic!("on purpose")).join()).collect();

        panic::set_hook(outer);
        assert!(outcomes.iter().all(Result::is_err));
        assert!(PROCESS.panics.get() >= before + 2);
    }
}
