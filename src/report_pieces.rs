//! The whole report of a running relay as JSON, in pieces: of ten thousand Services with a hundred thousand backends it is
//! tens of megabytes, and nobody has to hold them at once.
//!
//! What it says is `live`; who reads it is `admin`'s concern.

use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use hyper::body::Bytes;

use crate::live::{LiveReport, PauseReport};
use crate::name::ObjectName;
use crate::status::{Report, ServiceStatus, Status};

/// A piece ends with the Service that makes it so large: some hundred Services, or a single one with many backends.
const PIECE_BYTES: usize = 64 << 10;

/// The list that is filled in piece by piece. In a text each quote has a backslash before it, so this is nothing else.
const NO_SERVICES: &str = r#""services":[]"#;

/// The pieces of one report, each made when it is asked for, of one state of the relay. Counters are read then.
pub(crate) struct ReportPieces {
    status: Arc<Status>,
    /// What was not told yet; `None` once all was.
    rest: Option<Rest>,
}

struct Rest {
    /// What comes before the Services, up to the bracket; empty once told.
    head: String,
    /// The last Service that was told.
    told: Option<ObjectName>,
    /// What comes after them.
    tail: String,
}

impl ReportPieces {
    /// Begins with who answers, and why clients wait to be accepted.
    pub(crate) fn of(status: Arc<Status>, pauses: Vec<PauseReport>) -> Self {
        let (notes, problems) = status.notes_and_problems();
        let about = LiveReport::about(&status, Report { services: Vec::new(), problems, notes });
        let about = LiveReport { pauses, ..about };
        let text = serde_json::to_string(&about).expect("all keys of a report are text");
        let (head, tail) = text.split_once(NO_SERVICES).expect("a report has a list of Services");
        let rest = Rest { head: format!("{head}\"services\":["), told: None, tail: format!("]{tail}") };
        Self { status, rest: Some(rest) }
    }
}

impl Iterator for ReportPieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut rest = self.rest.take()?;
        let mut piece = std::mem::take(&mut rest.head).into_bytes();
        while piece.len() < PIECE_BYTES {
            let Some((name, service)) = next_service(&self.status, rest.told.as_ref()) else {
                piece.extend_from_slice(rest.tail.as_bytes());
                return Some(piece.into());
            };
            if rest.told.is_some() {
                piece.push(b',');
            }
            serde_json::to_writer(&mut piece, &service.live(&self.status)).expect("all keys of a report are text");
            rest.told = Some(name.clone());
        }
        self.rest = Some(rest);
        Some(piece.into())
    }
}

fn next_service<'s>(status: &'s Status, told: Option<&ObjectName>) -> Option<(&'s ObjectName, &'s ServiceStatus)> {
    let after = told.map_or(Unbounded, Excluded);
    let (name, service) = status.services.range::<ObjectName, _>((after, Unbounded)).next()?;
    Some((name, service))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::sample;
    use crate::plan::Problem;

    fn whole(status: Status) -> (usize, String) {
        let pieces: Vec<_> = ReportPieces::of(Arc::new(status), Vec::new()).collect();
        let text = pieces.concat();
        (pieces.len(), String::from_utf8(text).expect("JSON is text"))
    }

    #[test]
    fn given_a_report_when_told_in_pieces_then_together_they_are_the_report() {
        for status in [Status::default(), sample::status()] {
            let told_at_once = serde_json::to_string(&LiveReport::of(&status)).expect("JSON");

            assert_eq!(whole(status), (1, told_at_once));
        }
    }

    #[test]
    fn given_a_problem_that_looks_like_the_list_when_told_in_pieces_then_it_is_text() {
        let mut status = sample::status();
        status.problems = Arc::new(vec![Problem::error("Service default/web", "decode", NO_SERVICES)]);

        let (_, text) = whole(status);

        let report: LiveReport = serde_json::from_str(&text).expect("the same shape");
        assert_eq!(report.report.problems[0].message, NO_SERVICES);
        assert_eq!(report.report.services.len(), 3);
    }

    #[test]
    fn given_many_services_when_told_in_pieces_then_no_piece_is_much_larger_than_it_has_to_be() {
        let web = Arc::new(sample::web());
        let mut status = sample::status();
        let name = |number| ObjectName::new("default", format!("web-{number:03}"));
        status.services = (0..500).map(|number| (name(number), Arc::clone(&web))).collect();

        let pieces: Vec<_> = ReportPieces::of(Arc::new(status), Vec::new()).collect();

        assert!(pieces.len() > 5, "{}", pieces.len());
        assert!(pieces.iter().all(|piece| piece.len() < 2 * PIECE_BYTES));
        let report: LiveReport = serde_json::from_slice(&pieces.concat()).expect("the same shape");
        assert_eq!(report.report.services.len(), 500);
    }
}
