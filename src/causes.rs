//! An error and what caused it, as one line of the log.

use std::error::Error;
use std::iter::successors;

/// The longest text: a proxy in between may answer with a page.
const LONGEST: usize = 500;

/// An error with its causes, each once: some of `kube`'s name theirs themselves.
pub(crate) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    for cause in successors(error.source(), |&cause| cause.source()) {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
    }
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] Option<Box<Told>>);

    #[test]
    fn given_an_error_with_causes_when_told_then_each_is_told_once() {
        let error = Told("cannot list: refused", Some(Told("refused", Some(Told("by 10.0.0.1", None).into())).into()));

        assert_eq!(causes(&error), "cannot list: refused: by 10.0.0.1");
    }

    #[test]
    fn given_a_page_as_an_error_when_told_then_it_is_cut() {
        let page: &'static str = "é".repeat(2_000).leak();

        assert_eq!(causes(&Told(page, None)).chars().count(), LONGEST + 1);
    }
}
