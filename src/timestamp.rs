//! Moments as text: RFC 3339, printed in UTC with seconds as Kubernetes does, read in any of its forms.

use std::fmt::Write;
use std::ops::RangeInclusive;
use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS_PER_DAY: u64 = 86_400;

/// `2026-01-31T23:59:59Z`. A moment before 1970 is printed as the start of 1970.
pub fn rfc3339(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = civil_from_days(seconds / SECONDS_PER_DAY);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// `2026-01-31T23:59:59.250Z`: with thousandths of a second, for what comes and goes within one.
pub(crate) fn rfc3339_millis(moment: SystemTime) -> String {
    let milliseconds = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_millis());
    let mut text = rfc3339(moment);
    text.pop(); // The `Z` comes behind them.
    let _ = write!(text, ".{milliseconds:03}Z"); // Writing to a string cannot fail.
    text
}

/// A moment, to be compared with others: milliseconds since 1970 in UTC; what is finer is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(i64);

impl Moment {
    /// Reads `2026-01-31T23:59:59Z`, also with a fraction of a second (`59.25Z`) and an offset (`+02:00`).
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (date, clock) = text.split_once(['T', 't'])?;
        let (clock, offset_minutes) = match clock.strip_suffix(['Z', 'z']) {
            Some(clock) => (clock, 0),
            None => {
                let (clock, offset) = clock.split_at_checked(clock.rfind(['+', '-'])?)?;
                (clock, offset_minutes(offset)?)
            }
        };
        let [year, month, day] = numbers(date, '-', [0..=9999, 1..=12, 1..=31])?;
        if day > days_of_month(year, month) {
            return None;
        }
        let (clock, milliseconds) = match clock.split_once('.') {
            Some((clock, fraction)) => (clock, milliseconds(fraction)?),
            None => (clock, 0),
        };
        let [hour, minute, second] = numbers(clock, ':', [0..=23, 0..=59, 0..=59])?;
        let minutes = (days_from_civil(year, month, day) * 24 + hour) * 60 + minute - offset_minutes;
        Some(Self((minutes * 60 + second) * 1_000 + milliseconds))
    }
}

/// `+02:00`: how far its clocks are ahead of UTC.
fn offset_minutes(text: &str) -> Option<i64> {
    let (sign, clock) = text.split_at_checked(1)?;
    let [hours, minutes] = numbers(clock, ':', [0..=23, 0..=59])?;
    let ahead = hours * 60 + minutes;
    Some(if sign == "-" { -ahead } else { ahead })
}

/// Numbers of two digits (four where the range says so), in their ranges.
fn numbers<const N: usize>(text: &str, between: char, ranges: [RangeInclusive<i64>; N]) -> Option<[i64; N]> {
    let mut parts = text.split(between);
    let mut numbers = [0; N];
    for (number, range) in numbers.iter_mut().zip(ranges) {
        let part = parts.next()?;
        let digits = if *range.end() > 99 { 4 } else { 2 };
        *number = whole(part).filter(|number| part.len() == digits && range.contains(number))?;
    }
    parts.next().is_none().then_some(numbers)
}

/// `25` of `59.25`: thousandths of a second.
fn milliseconds(fraction: &str) -> Option<i64> {
    whole(fraction)?;
    fraction.bytes().chain(*b"000").take(3).try_fold(0, |sum, digit| Some(sum * 10 + i64::from(digit - b'0')))
}

fn whole(digits: &str) -> Option<i64> {
    // Signs are no digits, though they would be parsed.
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.get(..digits.len().min(18))?.parse().ok())?
}

fn days_of_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// The way back of [`civil_from_days`]: days since 1970-01-01.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    const DAYS_TO_1970: i64 = 719_468; // from 0000-03-01
    let (year, month_from_march) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + (153 * month_from_march + 2) / 5 + day - 1 - DAYS_TO_1970
}

/// Year, month (1..=12) and day (1..=31) of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Years are made to begin in March, so that the leap day is the last of its year and a month's first
/// day is a linear function of its number: (153 × month + 2) / 5.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    const DAYS_PER_ERA: u64 = 146_097; // 400 years, after which the calendar repeats
    const DAYS_TO_1970: u64 = 719_468; // from 0000-03-01
    let day = days + DAYS_TO_1970;
    let (era, day_of_era) = (day / DAYS_PER_ERA, day % DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day_of_month)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn given_moments_around_leap_days_when_printed_then_the_calendar_is_right() {
        let cases = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];

        for (seconds, text) in cases {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn given_a_part_of_a_second_when_printed_with_thousandths_then_it_is_cut_off_behind_three_digits() {
        let moment = |nanos| UNIX_EPOCH + Duration::new(1_709_164_800, nanos);

        assert_eq!(rfc3339_millis(moment(0)), "2024-02-29T00:00:00.000Z");
        assert_eq!(rfc3339_millis(moment(7_999_999)), "2024-02-29T00:00:00.007Z");
        assert_eq!(rfc3339_millis(UNIX_EPOCH - Duration::from_millis(1)), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn t029_given_moments_as_text_when_read_then_they_are_what_was_printed() {
        for day in (0..40_000).step_by(17) {
            let seconds = day * SECONDS_PER_DAY + 86_399;
            let text = rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(Moment::parse(&text), Some(Moment(seconds as i64 * 1_000)), "{text}");
        }
    }

    #[test]
    fn t029_given_offsets_and_fractions_when_read_then_one_moment_has_one_value() {
        let moment = |text| Moment::parse(text).expect("a moment");

        assert_eq!(moment("2024-05-01T00:30:00+02:00"), moment("2024-04-30T22:30:00Z"));
        assert_eq!(moment("2024-02-29T23:59:59-00:30"), moment("2024-03-01T00:29:59z"));
        assert_eq!(moment("2024-05-01T00:00:00.25Z"), Moment(moment("2024-05-01T00:00:00Z").0 + 250));
        assert_eq!(moment("2024-05-01T00:00:00.1239999999999999999999Z"), moment("2024-05-01T00:00:00.123Z"));
        assert!(moment("0001-01-01T00:00:00Z") < moment("1969-12-31T23:59:59.999Z"));
    }

    #[test]
    fn t029_given_what_is_no_moment_when_read_then_there_is_none() {
        let wrong = [
            "",
            "yesterday",
            "2024-05-01",
            "2024-05-01T00:00:00",
            "2024-05-01T00:00Z",
            "2024-02-30T00:00:00Z",
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-05-01T24:00:00Z",
            "2024-05-01T00:00:60Z",
            "2024-05-01T00:00:00.Z",
            "2024-05-01T00:00:00.+1Z",
            "2024-05-01T00:00:00+2:00",
            "+024-05-01T00:00:00Z",
            "2024-05-01T00:00:00é+02:00",
        ];

        for text in wrong {
            assert_eq!(Moment::parse(text), None, "{text}");
        }
    }

    #[test]
    fn given_a_clock_before_1970_when_printed_then_it_does_not_panic() {
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00Z");
    }
}
