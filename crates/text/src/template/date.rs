//! The date in words, for templates that tell the model what day it is.

use std::fmt::Write as _;

/// Seconds since 1970-01-01 00:00 in whatever time zone the template should see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnixTime(pub i64);

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
const DAY_SECONDS: i64 = 86_400;

impl UnixTime {
    /// As C's `strftime` in the C locale, for the directives that templates use; the unknown one is the error.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let days = self.0.div_euclid(DAY_SECONDS);
        let second = self.0.rem_euclid(DAY_SECONDS);
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let weekday = DAYS[usize::try_from(days.rem_euclid(7)).expect("0 to 6")];
        let month_name = MONTHS[usize::try_from(month - 1).expect("0 to 11")];
        let mut out = String::with_capacity(format.len() * 2);
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let directive = rest.next();
            let written = match directive {
                Some('Y') => write!(out, "{year}"),
                Some('y') => write!(out, "{:02}", year.rem_euclid(100)),
                Some('m') => write!(out, "{month:02}"),
                Some('d') => write!(out, "{day:02}"),
                Some('e') => write!(out, "{day:2}"),
                Some('B') => write!(out, "{month_name}"),
                Some('b') => write!(out, "{}", &month_name[..3]),
                Some('A') => write!(out, "{weekday}"),
                Some('a') => write!(out, "{}", &weekday[..3]),
                Some('H') => write!(out, "{hour:02}"),
                Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
                Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
                Some('M') => write!(out, "{minute:02}"),
                Some('S') => write!(out, "{second:02}"),
                Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
                Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
                Some('%') => write!(out, "%"),
                other => return Err(other.map(String::from).unwrap_or_default()),
            };
            written.expect("a String takes everything");
        }
        Ok(out)
    }
}

/// Year, month and day of the proleptic Gregorian calendar from days since 1970-01-01, by counting in eras of 400
/// years that begin on 1 March, so that the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    const ERA_DAYS: i64 = 146_097;
    let days = days + 719_468;
    let era = days.div_euclid(ERA_DAYS);
    let day_of_era = days.rem_euclid(ERA_DAYS);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds: i64, expected: &str| {
            assert_eq!(UnixTime(seconds).format("%A %F %T").as_deref(), Ok(expected));
        };
        check(0, "Thursday 1970-01-01 00:00:00");
        check(-1, "Wednesday 1969-12-31 23:59:59");
        check(951_782_400, "Tuesday 2000-02-29 00:00:00");
        check(1_732_233_600, "Friday 2024-11-22 00:00:00");
        check(4_107_542_400, "Monday 2100-03-01 00:00:00"); // 2100 is no leap year
    }

    #[test]
    fn directives_are_those_of_strftime() {
        let time = UnixTime(1_721_997_045); // 2024-07-26 12:30:45
        assert_eq!(time.format("%d %b %Y").unwrap(), "26 Jul 2024");
        assert_eq!(time.format("%B %e, %y %a %I:%M %p 100%%").unwrap(), "July 26, 24 Fri 12:30 PM 100%");
        assert_eq!(time.format("%Q"), Err("Q".to_owned()));
        assert_eq!(time.format("50%"), Err(String::new()));
    }
}
