//! `strftime_now`: the date and time of now, in UTC, for templates that tell the model what day it is.
//!
//! Civil dates are computed from days since 1970 by the usual era arithmetic (400 years are 146,097 days). Time zones and
//! locales are not here: names are English, the offset is zero.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

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
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const DAY_SECONDS: u64 = 86_400;

/// A moment in UTC, taken apart.
struct Civil {
    year: u64,
    /// 1 to 12.
    month: usize,
    day: u64,
    /// 0 is Sunday.
    weekday: usize,
    /// 1 to 366.
    year_day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    microsecond: u32,
}

/// The moment of the call, written as `format` says.
pub(crate) fn strftime_now(format: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, now.as_secs(), now.subsec_micros())
}

fn strftime(format: &str, unix_seconds: u64, microsecond: u32) -> String {
    let civil = Civil::from_unix(unix_seconds, microsecond);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        match rest.next() {
            Some('-') => {
                // glibc's "no padding", which Python passes on
                let mut padded = String::new();
                let directive = rest.next().unwrap_or('-');
                civil.write(directive, unix_seconds, &mut padded);
                let bare = padded.trim_start_matches(['0', ' ']);
                out.push_str(if bare.is_empty() { "0" } else { bare });
            }
            Some(directive) => civil.write(directive, unix_seconds, &mut out),
            None => out.push('%'),
        }
    }
    out
}

impl Civil {
    fn from_unix(unix_seconds: u64, microsecond: u32) -> Civil {
        let (days, seconds) = (unix_seconds / DAY_SECONDS, unix_seconds % DAY_SECONDS);
        // Years are counted from 1 March of year 0, so that the leap day is the last of its year.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let march_day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * march_day + 2) / 153;
        let day = march_day - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        // March is the third month: 59 days lie before it, one more in leap years; January follows 306 March days.
        let year_day = if month <= 2 { march_day - 305 } else { march_day + 60 + u64::from(is_leap) };
        Civil {
            year,
            month: month as usize,
            day,
            weekday: ((days + 4) % 7) as usize,
            year_day,
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
            microsecond,
        }
    }

    /// One directive; an unknown one stays as it stands.
    fn write(&self, directive: char, unix_seconds: u64, out: &mut String) {
        let month = MONTHS.get(self.month - 1).copied().unwrap_or_default();
        let weekday = WEEKDAYS.get(self.weekday).copied().unwrap_or_default();
        let hour_12 = (self.hour + 11) % 12 + 1;
        let monday_first = (self.weekday as u64 + 6) % 7;
        let written = match directive {
            'Y' => write!(out, "{}", self.year),
            'C' => write!(out, "{:02}", self.year / 100),
            'y' => write!(out, "{:02}", self.year % 100),
            'm' => write!(out, "{:02}", self.month),
            'd' => write!(out, "{:02}", self.day),
            'e' => write!(out, "{:2}", self.day),
            'j' => write!(out, "{:03}", self.year_day),
            'H' => write!(out, "{:02}", self.hour),
            'k' => write!(out, "{:2}", self.hour),
            'I' => write!(out, "{hour_12:02}"),
            'l' => write!(out, "{hour_12:2}"),
            'M' => write!(out, "{:02}", self.minute),
            'S' => write!(out, "{:02}", self.second),
            'f' => write!(out, "{:06}", self.microsecond),
            'p' => write!(out, "{}", if self.hour < 12 { "AM" } else { "PM" }),
            'B' => write!(out, "{month}"),
            'b' | 'h' => write!(out, "{month:.3}"),
            'A' => write!(out, "{weekday}"),
            'a' => write!(out, "{weekday:.3}"),
            'w' => write!(out, "{}", self.weekday),
            'u' => write!(out, "{}", monday_first + 1),
            'U' => write!(out, "{:02}", (self.year_day + 6 - self.weekday as u64) / 7),
            'W' => write!(out, "{:02}", (self.year_day + 6 - monday_first) / 7),
            's' => write!(out, "{unix_seconds}"),
            'Z' => write!(out, "UTC"),
            'z' => write!(out, "+0000"),
            'F' => write!(out, "{}-{:02}-{:02}", self.year, self.month, self.day),
            'T' | 'X' => write!(out, "{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
            'R' => write!(out, "{:02}:{:02}", self.hour, self.minute),
            'D' | 'x' => write!(out, "{:02}/{:02}/{:02}", self.month, self.day, self.year % 100),
            'c' => {
                let (day, year) = (self.day, self.year);
                let time = format_args!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second);
                write!(out, "{weekday:.3} {month:.3} {day:2} {time} {year}")
            }
            'n' => writeln!(out),
            't' => write!(out, "\t"),
            '%' => write!(out, "%"),
            other => write!(out, "%{other}"),
        };
        debug_assert!(written.is_ok(), "writing to a string cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_python() {
        let full = "%Y-%m-%d %H:%M:%S %j %a %A %b %B %p %I %y %u %w %U %W";
        // datetime.fromtimestamp(n, timezone.utc).strftime(...) of CPython 3.11
        for (unix, expected) in [
            (0, "1970-01-01 00:00:00 001 Thu Thursday Jan January AM 12 70 4 4 00 00"),
            (951_782_400, "2000-02-29 00:00:00 060 Tue Tuesday Feb February AM 12 00 2 2 09 09"),
            (951_868_799, "2000-02-29 23:59:59 060 Tue Tuesday Feb February PM 11 00 2 2 09 09"),
            (1_735_689_599, "2024-12-31 23:59:59 366 Tue Tuesday Dec December PM 11 24 2 2 52 53"),
            (1_704_067_200, "2024-01-01 00:00:00 001 Mon Monday Jan January AM 12 24 1 1 00 01"),
            (4_107_542_399, "2100-02-28 23:59:59 059 Sun Sunday Feb February PM 11 00 7 0 09 08"),
            (4_107_542_400, "2100-03-01 00:00:00 060 Mon Monday Mar March AM 12 00 1 1 09 09"),
        ] {
            assert_eq!(strftime(full, unix, 0), expected);
        }
    }

    #[test]
    fn padding_literals_and_unknown_directives() {
        assert_eq!(strftime("%-d/%-m %e %%%Q%", 0, 7), "1/1  1 %%Q%");
        assert_eq!(strftime("%d %b %Y, %f", 1_753_574_400, 42), "27 Jul 2025, 000042");
        assert_eq!(strftime("%-H:%-M", 0, 0), "0:0");
    }
}
