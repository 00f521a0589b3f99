//! The kernel's table of connections: a relay needs none, but where there is one that is full, the kernel drops packets.

use super::fact::{Fact, sysctl};
use super::finding::{Finding, Subject};

const SUBJECT: Subject = Subject::Conntrack;
/// With fewer, some thousand short connections fill it, as each stays for minutes.
const FEW_ENTRIES: u64 = 32_768;

/// The entries of this network namespace and the most that there may be; `None` where nothing is tracked.
pub(super) fn read() -> Fact<Option<(u64, u64)>> {
    let (count, most) = (sysctl("net.netfilter.nf_conntrack_count")?, sysctl("net.netfilter.nf_conntrack_max")?);
    Ok(count.zip(most))
}

pub(super) fn judge(table: &Fact<Option<(u64, u64)>>) -> Finding {
    let (count, most) = match table {
        Ok(None | Some((_, 0))) => {
            return Finding::ok(SUBJECT, "the kernel tracks no connections, or any number of them");
        }
        Ok(Some(table)) => *table,
        Err(why) => return Finding::unknown(SUBJECT, why),
    };
    let message = format!("nf_conntrack has {count} of {most} entries");
    let remedy = format!("`sysctl -w net.netfilter.nf_conntrack_max={}`", most.saturating_mul(2).max(131_072));
    if count >= share(most, 95) {
        return Finding::error(SUBJECT, format!("{message}: once full, the kernel drops whatever is new"))
            .remedy(remedy);
    }
    if count >= share(most, 80) {
        return Finding::warning(SUBJECT, format!("{message}: nearly full")).remedy(remedy);
    }
    if most < FEW_ENTRIES {
        return Finding::note(SUBJECT, format!("{message}: a burst of short connections fills it")).remedy(remedy);
    }
    Finding::ok(SUBJECT, message)
}

fn share(of: u64, percent: u64) -> u64 {
    of.saturating_mul(percent) / 100
}

#[cfg(test)]
mod tests {
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    #[test]
    fn f29_given_tables_when_judged_then_a_full_one_is_an_error_and_none_is_fine() {
        let grade = |table| judge(&Ok(table)).grade;

        assert_eq!(grade(Some((262_100, 262_144))), Grade::Error);
        assert_eq!(grade(Some((220_000, 262_144))), Grade::Warning);
        assert_eq!(grade(Some((10, 262_144))), Grade::Ok);
        assert_eq!(grade(Some((10, 16_384))), Grade::Note);
        assert_eq!((grade(None), grade(Some((5, 0)))), (Grade::Ok, Grade::Ok));
        assert_eq!(judge(&Err(Unreadable::new("x", "y"))).grade, Grade::Note);
    }

    #[test]
    fn f29_given_a_tiny_table_when_it_is_full_then_that_is_an_error_too() {
        assert_eq!(judge(&Ok(Some((100, 100)))).grade, Grade::Error);
    }
}
