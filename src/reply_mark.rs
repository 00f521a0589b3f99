//! The mark that says of a packet that it is for a socket of ours which has a client's address: a value, and the bits of the
//! mark that it is compared in.
//!
//! Others give marks to packets of the same machine, most of them a bit each. So one foreign bit is never enough, and bits
//! outside of the mask stay as they are. What is done by the mark is told in `reply_message`.

use std::fmt;
use std::str::FromStr;

/// A value, and the bits that count. From `--reply-mark`, default `0x100b/0x3fff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyMark {
    /// Not 0, and in bits of the mask alone.
    value: u32,
    mask: u32,
}

impl ReplyMark {
    /// The lower 14 bits as a whole, and no value that they are known to have. Of single bits there, 0x2000 is of the
    /// portmap plugin (hostPort) and podman, 0x80 of the VPC CNI, 0x20 and 0x40 of Talos; Cilium looks at 0x0f00 and has its
    /// keys in 0xf000 beside those, Istio has 0x539. The upper bits, which stay, are of kube-proxy (0x4000, 0x8000), Calico,
    /// Tailscale and Cilium's identities.
    pub const DEFAULT: Self = Self { value: 0x100b, mask: 0x3fff };

    /// As the kernel tells it of a rule.
    pub(crate) const fn told(value: u32, mask: u32) -> Self {
        Self { value, mask }
    }

    /// What a packet's mark is in these bits.
    pub fn value(self) -> u32 {
        self.value
    }

    /// The bits that count.
    pub fn mask(self) -> u32 {
        self.mask
    }

    /// True where a packet that has been given this mark, and was not marked before, has the other one, too.
    pub(crate) fn has(self, other: Self) -> bool {
        other.mask != 0 && self.value & other.mask == other.value
    }
}

impl Default for ReplyMark {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for ReplyMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

/// What is wrong with a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyMarkError {
    /// It is no two numbers.
    #[error("not a mark: write a value and the bits that count, like {}", ReplyMark::DEFAULT)]
    Form,
    /// Packets without a mark have it, too.
    #[error("packets that nobody has marked have 0: write another value, like {}", ReplyMark::DEFAULT)]
    Nothing,
    /// No packet can have it.
    #[error("{0:#x} has bits that the mask is to leave alone: write them in both, or in neither")]
    Beyond(u32),
}

impl FromStr for ReplyMark {
    type Err = ReplyMarkError;

    fn from_str(text: &str) -> Result<Self, ReplyMarkError> {
        let (value, mask) = text.split_once('/').ok_or(ReplyMarkError::Form)?;
        let (value, mask) = (number(value)?, number(mask)?);
        match (value, value & !mask) {
            (0, _) => Err(ReplyMarkError::Nothing),
            (_, 0) => Ok(Self { value, mask }),
            _ => Err(ReplyMarkError::Beyond(value)),
        }
    }
}

/// `0x3fff` or `16383`.
fn number(text: &str) -> Result<u32, ReplyMarkError> {
    let read = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if digits.starts_with('+') => return Err(ReplyMarkError::Form),
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    read.map_err(|_| ReplyMarkError::Form)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_mark_when_written_then_it_is_read_as_the_same_one() {
        for text in ["0x100b/0x3fff", "0x1/0x1", "0xffffffff/0xffffffff"] {
            assert_eq!(text.parse::<ReplyMark>().map(|mark| mark.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("4107/16383".parse(), Ok(ReplyMark::DEFAULT));
    }

    #[test]
    fn given_what_is_no_mark_when_read_then_what_would_be_right_is_told() {
        for text in ["", "0x100b", "0x100b/", "a/b", "0x/0x", "0x+1/0x1", "1/0x1ffffffff", "-1/1", "1/2/3"] {
            assert_eq!(text.parse::<ReplyMark>(), Err(ReplyMarkError::Form), "{text}");
        }
        assert_eq!("0/0xff".parse::<ReplyMark>(), Err(ReplyMarkError::Nothing));
        let beyond = "0x4001/0xff".parse::<ReplyMark>().expect_err("a bit too many").to_string();
        assert!(beyond.starts_with("0x4001 has bits"), "{beyond}");
        assert!(ReplyMarkError::Form.to_string().ends_with("like 0x100b/0x3fff"));
    }

    #[test]
    fn given_marks_that_others_are_known_to_use_when_compared_then_none_is_ours_and_ours_is_none_of_them() {
        let others = [
            ("kube-proxy masquerades", 0x4000, 0x4000),
            ("kube-proxy drops", 0x8000, 0x8000),
            ("portmap, podman", 0x2000, 0x2000),
            ("VPC CNI", 0x80, 0x80),
            ("Talos", 0x20, 0x60),
            ("Talos", 0x40, 0x60),
            ("Cilium to its proxy", 0x200, 0xf00),
            ("Cilium encrypts", 0xe00, 0xf00),
            ("Cilium decrypts", 0xd00, 0xf00),
            ("Istio", 0x539, u32::MAX),
            ("Istio ambient", 0x539, 0xfff),
            ("TPROXY as the kernel's documents have it", 1, u32::MAX),
            ("WireGuard", 51_820, u32::MAX),
            ("Tailscale", 0x4_0000, 0xff_0000),
        ];
        for (who, value, mask) in others {
            let other = ReplyMark::told(value, mask);
            assert!(!ReplyMark::DEFAULT.has(other) && !other.has(ReplyMark::DEFAULT), "{who}");
        }
    }
}
