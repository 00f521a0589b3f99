//! Work on many pieces, shared among a few threads for as long as it lasts.
//!
//! How many threads it is worth is for the caller to say.

use std::panic::resume_unwind;
use std::thread::{self, Builder};

/// Has each of up to `threads` threads work on a part of all pieces; the caller's is one of them. What they return is in
/// the order of the pieces.
///
/// A part for which the system has no thread left is worked on by the caller: it comes later, never not at all.
pub(crate) fn in_parts<'p, P: Sync, R: Send>(
    pieces: &'p [P],
    threads: usize,
    work: impl Fn(&'p [P]) -> R + Sync,
) -> Vec<R> {
    in_parts_by(Builder::new, pieces, threads, &work)
}

fn in_parts_by<'p, P: Sync, R: Send>(
    builder: impl Fn() -> Builder,
    pieces: &'p [P],
    threads: usize,
    work: &(impl Fn(&'p [P]) -> R + Sync),
) -> Vec<R> {
    let mut parts = pieces.chunks(pieces.len().div_ceil(threads.max(1)).max(1));
    let Some(own) = parts.next() else { return Vec::new() };
    thread::scope(|scope| {
        let given: Vec<_> = parts.map(|part| (part, builder().spawn_scoped(scope, move || work(part)).ok())).collect();
        let mut done = Vec::with_capacity(1 + given.len());
        done.push(work(own));
        done.extend(given.into_iter().map(|(part, running)| match running {
            Some(running) => running.join().unwrap_or_else(|panic| resume_unwind(panic)),
            None => work(part),
        }));
        done
    })
}

#[cfg(test)]
mod tests {
    use std::thread::{ThreadId, current};

    use super::*;

    const PIECES: [u32; 7] = [1, 2, 3, 4, 5, 6, 7];

    fn with_its_thread(part: &[u32]) -> (Vec<u32>, ThreadId) {
        (part.to_vec(), current().id())
    }

    #[test]
    fn given_pieces_when_shared_then_each_thread_has_a_part_and_the_order_stays() {
        let done = in_parts(&PIECES, 3, with_its_thread);

        assert_eq!(done.iter().map(|(part, _)| &part[..]).collect::<Vec<_>>(), [&PIECES[..3], &PIECES[3..6], &[7]]);
        assert_eq!(done.iter().filter(|(_, thread)| *thread == current().id()).count(), 1);
    }

    #[test]
    fn given_one_thread_when_shared_then_it_is_the_callers() {
        for threads in [0, 1] {
            assert_eq!(in_parts(&PIECES, threads, with_its_thread), [(PIECES.to_vec(), current().id())]);
        }
        assert_eq!(in_parts(&[], 3, with_its_thread), []);
    }

    #[test]
    fn given_no_thread_can_be_made_when_shared_then_the_caller_does_it_all() {
        let no_room = || Builder::new().stack_size(1 << 60);

        let done = in_parts_by(no_room, &PIECES, 3, &with_its_thread);

        assert_eq!(done.iter().flat_map(|(part, _)| part.clone()).collect::<Vec<_>>(), PIECES);
        assert!(done.len() == 3 && done.iter().all(|(_, thread)| *thread == current().id()));
    }
}
