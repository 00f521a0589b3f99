//! How much may wait in the kernel: connections for accept, datagrams for a receiver.

use super::duty::Duty;
use super::fact::{Fact, sysctl};
use super::finding::{Finding, Subject};
use crate::serve::mmsg::LISTENER_BUFFER_BYTES;

const SUBJECT: Subject = Subject::Queues;
/// What kernels have by default since 5.4; before it was 128.
const BACKLOG: u32 = 4_096;

#[derive(Debug)]
pub(super) struct Facts {
    /// `net.core.somaxconn`: connections that may wait for accept, which is what our listeners ask for.
    pub(super) backlog: Fact<Option<u32>>,
    /// `net.ipv4.tcp_max_syn_backlog` and `net.ipv4.tcp_syncookies`: the first one counts where the other is 0.
    pub(super) handshakes: Fact<Option<u32>>,
    pub(super) cookies: Fact<Option<u8>>,
    /// `net.core.rmem_max` and `net.core.wmem_max`, in bytes.
    pub(super) received_bytes: Fact<Option<u64>>,
    pub(super) sent_bytes: Fact<Option<u64>>,
}

pub(super) fn read() -> Facts {
    Facts {
        backlog: sysctl("net.core.somaxconn"),
        handshakes: sysctl("net.ipv4.tcp_max_syn_backlog"),
        cookies: sysctl("net.ipv4.tcp_syncookies"),
        received_bytes: sysctl("net.core.rmem_max"),
        sent_bytes: sysctl("net.core.wmem_max"),
    }
}

pub(super) fn judge(facts: &Facts, duty: &Duty) -> Vec<Finding> {
    let bytes = [("rmem_max", &facts.received_bytes), ("wmem_max", &facts.sent_bytes)];
    let datagrams = bytes.map(|(name, fact)| judge_buffer(name, fact, duty));
    [judge_backlog(&facts.backlog), judge_handshakes(facts)].into_iter().chain(datagrams).collect()
}

fn judge_backlog(backlog: &Fact<Option<u32>>) -> Finding {
    let backlog = match backlog {
        Ok(backlog) => backlog.unwrap_or(BACKLOG), // It is not told in each network namespace.
        Err(why) => return Finding::unknown(SUBJECT, why),
    };
    let message = format!("net.core.somaxconn is {backlog}: so many connections may wait for accept at each listener");
    match backlog {
        few if few < BACKLOG => {
            Finding::warning(SUBJECT, format!("{message}, and those of a burst beyond it are late"))
                .remedy(format!("`sysctl -w net.core.somaxconn={BACKLOG}`, before kube-relay starts"))
        }
        _ => Finding::ok(SUBJECT, message),
    }
}

fn judge_handshakes(facts: &Facts) -> Finding {
    match (&facts.handshakes, &facts.cookies) {
        (Err(why), _) | (_, Err(why)) => Finding::unknown(SUBJECT, why),
        (Ok(Some(backlog)), Ok(Some(0))) => Finding::warning(
            SUBJECT,
            format!("net.ipv4.tcp_syncookies is 0: after {backlog} half-open connections new ones are dropped"),
        )
        .remedy("`sysctl -w net.ipv4.tcp_syncookies=1`"),
        _ => Finding::ok(SUBJECT, "a flood of SYNs is answered with cookies"),
    }
}

/// Sockets get as much as the setting says, and say nothing where they asked for more.
fn judge_buffer(name: &str, most: &Fact<Option<u64>>, duty: &Duty) -> Finding {
    let wanted = LISTENER_BUFFER_BYTES as u64;
    match most {
        Err(why) => Finding::unknown(SUBJECT, why),
        Ok(Some(most)) if *most < wanted && duty.serves_udp() => Finding::note(
            SUBJECT,
            format!(
                "net.core.{name} is {most} bytes, UDP listeners want {wanted}: longer bursts of datagrams are lost"
            ),
        )
        .remedy(format!("`sysctl -w net.core.{name}={wanted}`, before kube-relay starts")),
        Ok(_) => Finding::ok(SUBJECT, format!("net.core.{name} is large enough for what is to be served")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::duty::sample::{duty, unknown};
    use super::super::fact::Unreadable;
    use super::super::finding::Grade;
    use super::*;

    fn facts() -> Facts {
        Facts {
            backlog: Ok(Some(4_096)),
            handshakes: Ok(Some(512)),
            cookies: Ok(Some(1)),
            received_bytes: Ok(Some(212_992)),
            sent_bytes: Ok(Some(4 << 20)),
        }
    }

    fn grades(facts: &Facts, duty: &Duty) -> Vec<Grade> {
        judge(facts, duty).into_iter().map(|finding| finding.grade).collect()
    }

    #[test]
    fn given_a_default_kernel_when_judged_then_small_buffers_are_told_to_who_serves_datagrams_alone() {
        let dns = duty(&["clusterIP 10.96.0.10:53/UDP"]);

        assert_eq!(grades(&facts(), &unknown()), [Grade::Ok; 4]);
        assert_eq!(grades(&facts(), &dns), [Grade::Ok, Grade::Ok, Grade::Note, Grade::Ok]);
        let told = &judge(&facts(), &dns)[2];
        assert!(told.message.contains("rmem_max is 212992 bytes") && told.remedy.is_some(), "{told:?}");
    }

    #[test]
    fn given_short_queues_when_judged_then_they_are_warned_of() {
        let facts = Facts { backlog: Ok(Some(128)), cookies: Ok(Some(0)), ..facts() };

        assert_eq!(grades(&facts, &unknown()), [Grade::Warning, Grade::Warning, Grade::Ok, Grade::Ok]);
    }

    #[test]
    fn given_settings_that_cannot_be_read_when_judged_then_that_is_said() {
        let facts = Facts { backlog: Err(Unreadable::new("x", "y")), received_bytes: Ok(None), ..facts() };

        assert_eq!(grades(&facts, &unknown()), [Grade::Note, Grade::Ok, Grade::Ok, Grade::Ok]);
    }
}
