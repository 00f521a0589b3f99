//! Trains of datagrams: equal ones behind one another, as the kernel joins them (GRO) and takes them apart (GSO).
//!
//! Pure: which datagrams fit into one message is decided here, messages are built and sent in `mmsg`.

use std::io;

/// Datagrams in one message: what kernels have taken apart since UDP_SEGMENT came (newer ones take 128).
const MOST_DATAGRAMS: usize = 64;

/// The kernel takes apart what fits into one IPv4 packet, and no more.
const MOST_BYTES: usize = 65_507;

/// Payload bytes that fit into one packet on every link that carries IPv6 (MTU 1,280): where the kernel will not
/// split even these, it is not for their length.
const FITS_EVERYWHERE: usize = 1_232;

/// Datagrams behind one another in one buffer: each of `segment` bytes, the last one of as many or fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Train {
    /// Bytes of all of them.
    pub(super) length: usize,
    /// Bytes of one; 0 for an empty datagram, which is always alone.
    pub(super) segment: usize,
}

impl Train {
    /// One datagram.
    pub(super) const fn single(length: usize) -> Self {
        Self { length, segment: length }
    }

    /// What the kernel has joined. It says nothing of a segment where there is one datagram.
    pub(super) fn joined(length: usize, segment: usize) -> Self {
        if (1..length).contains(&segment) { Self { length, segment } } else { Self::single(length) }
    }

    /// How many there are: at least one.
    pub(super) fn datagrams(self) -> usize {
        self.length.div_ceil(self.segment.max(1)).max(1)
    }

    /// What is behind the first `bytes`, which are whole datagrams.
    fn behind(self, bytes: usize) -> Self {
        Self::joined(self.length - bytes, self.segment)
    }

    /// The first datagrams, up to `most`.
    fn first(self, most: usize) -> Self {
        Self::joined(self.length.min(self.segment.saturating_mul(most)), self.segment)
    }
}

/// Which datagrams one message may hold. Owned by a shard's batch; learns from the kernel's refusals.
#[derive(Clone, Copy, Debug)]
pub(super) struct Joining {
    /// The longest datagrams that may be joined: the kernel does not send fragments of a segment.
    segment_limit: usize,
}

impl Default for Joining {
    fn default() -> Self {
        Self { segment_limit: MOST_BYTES }
    }
}

impl Joining {
    /// Every datagram is a message of its own.
    pub(super) const NEVER: Self = Self { segment_limit: 0 };

    /// True where datagrams may be joined at all.
    pub(super) fn is_on(self) -> bool {
        self.segment_limit > 0
    }

    /// The part of a train behind its first `offset` bytes that one message may hold.
    pub(super) fn load(self, train: Train, offset: usize) -> Load {
        let rest = train.behind(offset);
        Load { train: rest.first(self.most(rest.segment)) }
    }

    /// Learns that the kernel did not take a message of several datagrams, and why. True where they may be sent
    /// again, each on its own; false where the reason is another one.
    ///
    /// Where the segment is longer than what the way carries, datagrams as long as these are not joined again: alone
    /// they are sent in fragments. Where that cannot be it, none are: a tunnel or a device that cannot compute checksums.
    pub(super) fn learn(&mut self, error: &io::Error, load: Load) -> bool {
        let segment = load.train.segment;
        match error.raw_os_error() {
            _ if load.datagrams() < 2 => return false,
            Some(libc::EMSGSIZE | libc::EINVAL) if segment > FITS_EVERYWHERE => {
                self.segment_limit = self.segment_limit.min(segment - 1);
            }
            Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO) => *self = Self::NEVER,
            _ => return false,
        }
        true
    }

    /// How many datagrams of a length one message may hold.
    fn most(self, segment: usize) -> usize {
        if segment == 0 || segment > self.segment_limit { 1 } else { (MOST_BYTES / segment).clamp(1, MOST_DATAGRAMS) }
    }
}

/// The datagrams of one message: one train, though its parts may lie in several buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    train: Train,
}

impl Load {
    /// Puts a train behind what is there, where the kernel can tell the datagrams apart again.
    pub(super) fn join(&mut self, next: Train, joining: Joining) -> bool {
        let Train { length, segment } = self.train;
        let most = joining.most(segment);
        let ends_short = segment == 0 || !length.is_multiple_of(segment);
        let is_alike = next.segment == segment || (next.datagrams() == 1 && (1..segment).contains(&next.length));
        let joins = !ends_short && is_alike && self.datagrams() + next.datagrams() <= most;
        if joins {
            self.train.length += next.length;
        }
        joins
    }

    /// How many there are.
    pub(super) fn datagrams(self) -> usize {
        self.train.datagrams()
    }

    /// Their bytes.
    pub(super) fn bytes(self) -> usize {
        self.train.length
    }

    /// What the kernel needs to know to take them apart; `None` for one.
    pub(super) fn segment(self) -> Option<u16> {
        if self.datagrams() > 1 { u16::try_from(self.train.segment).ok() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages that single datagrams of these lengths make, each as `datagrams×segment=bytes`.
    fn messages(lengths: &[usize], joining: Joining) -> Vec<String> {
        let mut loads: Vec<Load> = Vec::new();
        for length in lengths {
            let train = Train::single(*length);
            if !loads.last_mut().is_some_and(|load| load.join(train, joining)) {
                loads.push(joining.load(train, 0));
            }
        }
        loads.iter().map(|load| format!("{}×{}={}", load.datagrams(), load.train.segment, load.bytes())).collect()
    }

    fn error(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn given_datagrams_when_joined_then_a_message_holds_equal_ones_and_ends_with_a_shorter_one() {
        let on = Joining::default();

        assert_eq!(messages(&[100, 100, 100], on), ["3×100=300"]);
        assert_eq!(messages(&[100, 100, 40, 100, 100], on), ["3×100=240", "2×100=200"]);
        assert_eq!(messages(&[40, 100, 100], on), ["1×40=40", "2×100=200"]);
        assert_eq!(messages(&[100, 100, 40, 40], on), ["3×100=240", "1×40=40"]);
        assert_eq!(messages(&[100, 100], Joining::NEVER), ["1×100=100", "1×100=100"]);
    }

    #[test]
    fn given_empty_datagrams_when_joined_then_each_stays_alone() {
        assert_eq!(messages(&[0, 0, 8, 0, 8], Joining::default()), ["1×0=0", "1×0=0", "1×8=8", "1×0=0", "1×8=8"]);
    }

    #[test]
    fn given_more_than_one_message_can_hold_when_joined_then_the_next_one_begins() {
        let on = Joining::default();

        assert_eq!(messages(&[64; 65], on), ["64×64=4096", "1×64=64"]);
        assert_eq!(messages(&[1472; 45], on), ["44×1472=64768", "1×1472=1472"]);
        assert_eq!(messages(&[65_507; 2], on), ["1×65507=65507", "1×65507=65507"]);
    }

    #[test]
    fn given_a_train_when_it_is_split_then_each_part_has_whole_datagrams_and_nothing_is_left_out() {
        let train = Train::joined(100 * 100 + 30, 100);
        assert_eq!(train.datagrams(), 101);

        for (joining, parts) in [(Joining::default(), vec![64, 37]), (Joining::NEVER, vec![1; 101])] {
            let (mut offset, mut found) = (0, Vec::new());
            while offset < train.length {
                let load = joining.load(train, offset);
                found.push(load.datagrams());
                offset += load.bytes();
            }
            assert_eq!((offset, found), (train.length, parts));
        }
    }

    #[test]
    fn given_two_trains_when_the_first_ends_short_then_they_stay_apart() {
        let on = Joining::default();
        let mut even = on.load(Train::joined(300, 100), 0);
        let mut short = on.load(Train::joined(250, 100), 0);

        assert!(even.join(Train::joined(250, 100), on));
        assert!(!even.join(Train::single(100), on));
        assert!(!short.join(Train::single(100), on));
        assert!(!on.load(Train::joined(300, 100), 0).join(Train::joined(90, 40), on));
        assert_eq!((even.datagrams(), even.segment()), (6, Some(100)));
    }

    #[test]
    fn f16_given_the_kernel_will_not_split_long_datagrams_when_learnt_then_shorter_ones_are_still_joined() {
        let mut joining = Joining::default();
        let long = joining.load(Train::joined(4000, 2000), 0);

        assert!(joining.learn(&error(libc::EINVAL), long));

        assert_eq!(messages(&[2000, 2000], joining), ["1×2000=2000", "1×2000=2000"]);
        assert_eq!(messages(&[1999, 1999], joining), ["2×1999=3998"]);
    }

    #[test]
    fn f16_given_the_kernel_will_not_split_at_all_when_learnt_then_nothing_is_joined_any_more() {
        for errno in [libc::EIO, libc::EINVAL] {
            let mut joining = Joining::default();
            let short = joining.load(Train::joined(128, 64), 0);

            assert!(joining.learn(&error(errno), short));

            assert!(!joining.is_on());
        }
    }

    #[test]
    fn given_an_error_that_is_not_about_joining_when_met_then_nothing_is_learnt() {
        let mut joining = Joining::default();
        let (two, one) = (joining.load(Train::joined(128, 64), 0), joining.load(Train::single(64), 0));

        assert!(!joining.learn(&error(libc::EAGAIN), two));
        assert!(!joining.learn(&error(libc::EINVAL), one));

        assert!(joining.is_on());
    }
}
