//! The last word of whoever will not: why, as a text for people and as the word that is counted.
//!
//! The word comes behind the text, where versions that know of none do not look.

use super::parcel::{Kind, Parcel};
use crate::stats::UpgradeResult;

/// Why nothing comes of a hand-over, as the other process says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// As it is for a log.
    pub(crate) why: String,
    /// One of the words for failures.
    pub(crate) reason: UpgradeResult,
}

impl Refusal {
    /// What is sent.
    pub(super) fn parcel(why: &str, reason: UpgradeResult) -> Parcel {
        Parcel::new(Kind::Refused, &why).with_bytes([reason.as_str().as_bytes()])
    }

    /// What a parcel of the kind [`Kind::Refused`] says. It is another process's word: whatever cannot be read is passed over.
    pub(super) fn of(parcel: &Parcel) -> Self {
        let why = parcel.said::<String>().unwrap_or_default().escape_debug().to_string();
        let failures = UpgradeResult::ALL.iter().filter(|word| **word != UpgradeResult::Success);
        let said = failures.copied().find(|word| word.as_str().as_bytes() == parcel.bytes());
        Self { why, reason: said.unwrap_or(UpgradeResult::Refused) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f25_given_a_refusal_when_it_is_told_then_text_and_word_are_what_they_were_and_what_is_not_known_is_no_success() {
        let said =
            |body: &[u8]| Refusal::of(&Parcel { kind: Kind::Refused, body: body.to_vec(), descriptors: Vec::new() });

        let told = Refusal::of(&Refusal::parcel("it is too\nlate", UpgradeResult::Timeout));

        assert_eq!(told, Refusal { why: "it is too\\nlate".into(), reason: UpgradeResult::Timeout });
        let older = said(b"\"busy\"");
        assert_eq!((older.why.as_str(), older.reason), ("busy", UpgradeResult::Refused), "a version without words");
        for odd in [&b"\"\"\nsuccess"[..], b"\"\"\nlater", b"{}\n\xff", b""] {
            assert_eq!(said(odd), Refusal { why: String::new(), reason: UpgradeResult::Refused });
        }
    }
}
