//! The whole report of a running relay as JSON, in pieces: of ten thousand Services with a hundred thousand backends it is
//! tens of megabytes, and nobody has to hold them at once.
//!
//! What it says is `live`; who reads it is `admin`'s concern.

use std::net::IpAddr;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use hyper::body::Bytes;

use crate::live::{LiveReport, NoService, PauseReport};
use crate::name::ObjectName;
use crate::status::{Report, ServiceStatus, Status};
use crate::status_query::Excerpt;

/// A piece ends with the Service that makes it so large: some hundred Services, or a single one with many backends.
const PIECE_BYTES: usize = 64 << 10;

/// The list that is filled in piece by piece. In a text each quote has a backslash before it, so this is nothing else.
const NO_SERVICES: &str = r#""services":[]"#;

/// The pieces of one report, each made when it is asked for, of one state of the relay. Counters are read then.
pub(crate) struct ReportPieces {
    status: Arc<Status>,
    /// The Service that is told alone; `None` where all are.
    only: Option<ObjectName>,
    /// A client; `None` where nobody asks about one.
    client: Option<IpAddr>,
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
    ///
    /// # Errors
    /// Where one Service is wanted that is not there: so much as a sentence.
    pub(crate) fn of(status: Arc<Status>, pauses: Vec<PauseReport>, wanted: Excerpt) -> Result<Self, NoService> {
        let Excerpt { service: only, client } = wanted;
        let (notes, problems) = status.notes_and_problems();
        let mut about = LiveReport::about(&status, Report { services: Vec::new(), problems, notes });
        if let Some(name) = &only {
            if !status.services.contains_key(name) {
                return Err(NoService::of(name, status.services.keys()));
            }
            about.keep_what_concerns(name);
        }
        let about = LiveReport { pauses, ..about };
        let text = serde_json::to_string(&about).expect("all keys of a report are text");
        let (head, tail) = text.split_once(NO_SERVICES).expect("a report has a list of Services");
        let rest = Rest { head: format!("{head}\"services\":["), told: None, tail: format!("]{tail}") };
        Ok(Self { status, only, client, rest: Some(rest) })
    }
}

impl Iterator for ReportPieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut rest = self.rest.take()?;
        let mut piece = std::mem::take(&mut rest.head).into_bytes();
        while piece.len() < PIECE_BYTES {
            let Some((name, service)) = self.service_after(rest.told.as_ref()) else {
                piece.extend_from_slice(rest.tail.as_bytes());
                return Some(piece.into());
            };
            if rest.told.is_some() {
                piece.push(b',');
            }
            let told = service.live_to(&self.status, self.client);
            serde_json::to_writer(&mut piece, &told).expect("all keys of a report are text");
            rest.told = Some(name.clone());
        }
        self.rest = Some(rest);
        Some(piece.into())
    }
}

impl ReportPieces {
    fn service_after(&self, told: Option<&ObjectName>) -> Option<(&ObjectName, &ServiceStatus)> {
        let services = &self.status.services;
        let (name, service) = match &self.only {
            Some(only) => services.get_key_value(only).filter(|_| told.is_none())?,
            None => services.range::<ObjectName, _>((told.map_or(Unbounded, Excluded), Unbounded)).next()?,
        };
        Some((name, service))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::choice::{Kept, Pin};
    use crate::live::sample;
    use crate::model::Service;
    use crate::plan::Problem;
    use crate::recent::Recent;
    use crate::serve::balancer::Tried;
    use crate::status::ServiceReport;

    fn pieces(status: Status, wanted: Excerpt) -> Result<ReportPieces, NoService> {
        ReportPieces::of(Arc::new(status), Vec::new(), wanted)
    }

    fn only(name: &str) -> Excerpt {
        Excerpt { service: Some(ObjectName::parse(name)), client: None }
    }

    fn whole(status: Status) -> (usize, String) {
        let pieces: Vec<_> = pieces(status, Excerpt::default()).expect("all are asked for").collect();
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
    fn given_one_service_when_told_then_it_is_what_the_whole_report_says_of_it() {
        let mut status = sample::status();
        let mut recent = Recent::default();
        for service in ["web", "dns"] {
            recent.add("2026-11-21T10:00:00Z", &ObjectName::parse(service), vec!["added".into()]);
        }
        status.recent = Arc::new(recent);
        let mut whole = LiveReport::of(&status);
        whole.keep_what_concerns(&ObjectName::parse("web"));

        let told: Vec<_> = pieces(status, only("web")).expect("it is there").collect();

        let whole = serde_json::to_string(&whole).expect("JSON");
        assert_eq!(String::from_utf8_lossy(&told.concat()), whole);
        assert!(whole.contains(r#""service":"default/web""#) && !whole.contains("default/dns"), "{whole}");
    }

    #[test]
    fn given_a_client_when_asked_about_then_it_is_told_where_it_is_kept_and_nothing_else_changes() {
        let mut status = sample::status();
        let mut web = sample::web();
        web.service = Arc::new(Service { affinity_timeout: Some(Duration::from_secs(60)), ..(*web.service).clone() });
        let balancer = Arc::clone(&web.ports[0].balancers[0]);
        balancer.port.affinity.set_timeout(Some(Duration::from_secs(60)));
        status.services.insert(ObjectName::parse("web"), Arc::new(web));
        let client = IpAddr::from([192, 0, 2, 7]);
        let told = |wanted: Excerpt| {
            let told: Vec<_> = pieces(status.clone(), wanted).expect("it is there").collect();
            let report: LiveReport = serde_json::from_slice(&told.concat()).expect("the same shape");
            report.report.services
        };
        let pin = |service: &ServiceReport| service.ports.first().and_then(|port| port.choices.first()?.pin);
        let asked = || pin(&told(Excerpt { client: Some(client), ..only("web") })[0]).expect("it is asked about");

        assert_eq!(asked(), Pin { client, kept: None });
        let chosen = balancer.pick(client, &Tried::default(), Instant::now()).expect("a backend");
        let Pin { kept: Some(Kept { backend, seconds }), .. } = asked() else { panic!("it is kept") };

        assert_eq!(backend, chosen.address());
        assert!((50..=60).contains(&seconds), "{seconds}");
        let all = told(Excerpt { client: Some(client), ..Excerpt::default() });
        let pins: Vec<_> = all.iter().map(|service| (service.name.as_str(), pin(service).is_some())).collect();
        assert_eq!(pins, [("dns", false), ("headless", false), ("web", true)], "the others have no affinity");
        assert!(told(only("web")).iter().all(|web| pin(web).is_none()), "nobody has asked");
    }

    #[test]
    fn given_a_service_that_is_not_there_when_asked_for_then_those_of_its_name_are_told() {
        let error = |name| pieces(sample::status(), only(name)).err().map(|error| error.to_string());

        assert_eq!(error("shop/web").as_deref(), Some("there is no Service shop/web, but default/web"));
        assert_eq!(error("shop/mail").as_deref(), Some("there is no Service shop/mail"));
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

        let one: Vec<_> = pieces(status.clone(), only("default/web-007")).expect("it is there").collect();
        let pieces: Vec<_> = pieces(status, Excerpt::default()).expect("all are asked for").collect();

        assert_eq!(one.len(), 1);
        assert!(one[0].len() < PIECE_BYTES / 10, "{}", one[0].len());
        assert!(pieces.len() > 5, "{}", pieces.len());
        assert!(pieces.iter().all(|piece| piece.len() < 2 * PIECE_BYTES));
        let report: LiveReport = serde_json::from_slice(&pieces.concat()).expect("the same shape");
        assert_eq!(report.report.services.len(), 500);
    }
}
