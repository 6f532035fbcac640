//! Which day and month an instant belongs to, in the operator's zone, and when they end.
//!
//! Invariant: a period is a function of the instant and the offset alone; nothing has to fire at midnight for a new
//! period to begin. Zones are fixed offsets (`QUOTA_UTC_OFFSET`): the platform's users share one midnight.
//!
//! PURE.

use chrono::{DateTime, Datelike, Days, FixedOffset, Months, NaiveDate, NaiveTime, Utc};

use super::QuotaType;

/// The operator's fixed offset from UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zone(FixedOffset);

impl Zone {
    /// Parses `+08:00`, `-03:30` or `Z`.
    ///
    /// # Errors
    /// An English sentence for the operator.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("QUOTA_UTC_OFFSET {text:?} must look like +08:00");
        if text == "Z" {
            return FixedOffset::east_opt(0).map(Self).ok_or_else(wrong);
        }
        let sign = match text.get(..1) {
            Some("+") => 1,
            Some("-") => -1,
            _ => return Err(wrong()),
        };
        let (hours, minutes) = text.get(1..).and_then(|rest| rest.split_once(':')).ok_or_else(wrong)?;
        let number = |part: &str| if part.len() == 2 { part.parse::<u8>().map_err(|_| wrong()) } else { Err(wrong()) };
        let (hours, minutes) = (number(hours)?, number(minutes)?);
        if hours > 14 || minutes > 59 {
            return Err(wrong());
        }
        FixedOffset::east_opt(sign * (i32::from(hours) * 3600 + i32::from(minutes) * 60)).map(Self).ok_or_else(wrong)
    }

    fn local(self, now_ms: i64) -> DateTime<FixedOffset> {
        DateTime::<Utc>::from_timestamp_millis(now_ms).unwrap_or_default().with_timezone(&self.0)
    }

    /// The key of the period `now_ms` (unix ms) lies in: `2026-11-23`, `2026-11` or `total`.
    #[must_use]
    pub fn period(self, quota_type: QuotaType, now_ms: i64) -> String {
        let date = self.local(now_ms).date_naive();
        match quota_type {
            QuotaType::Daily => date.format("%Y-%m-%d").to_string(),
            QuotaType::Monthly => date.format("%Y-%m").to_string(),
            QuotaType::Total => "total".to_owned(),
        }
    }

    /// When the period that holds `now_ms` ends, unix ms; `None` for `total`, which never does.
    #[must_use]
    pub fn resets_at(self, quota_type: QuotaType, now_ms: i64) -> Option<i64> {
        let date = self.local(now_ms).date_naive();
        let next = match quota_type {
            QuotaType::Daily => date.checked_add_days(Days::new(1)),
            QuotaType::Monthly => {
                NaiveDate::from_ymd_opt(date.year(), date.month(), 1).and_then(|first| first.checked_add_months(Months::new(1)))
            }
            QuotaType::Total => None,
        }?;
        Some(next.and_time(NaiveTime::MIN).and_local_timezone(self.0).single()?.timestamp_millis())
    }

    /// The instant a query means: RFC 3339, unix ms, or a local date (its first instant; the next day's with `whole_day`).
    #[must_use]
    pub fn instant(self, text: &str, whole_day: bool) -> Option<i64> {
        if let Ok(at) = DateTime::parse_from_rfc3339(text) {
            return Some(at.timestamp_millis());
        }
        if let Ok(ms) = text.parse::<i64>() {
            return (0..=8_640_000_000_000_000).contains(&ms).then_some(ms);
        }
        let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
        let date = date.checked_add_days(Days::new(u64::from(whole_day)))?;
        Some(date.and_time(NaiveTime::MIN).and_local_timezone(self.0).single()?.timestamp_millis())
    }

    /// The offset from UTC, ms.
    #[must_use]
    pub fn offset_ms(self) -> i64 {
        i64::from(self.0.local_minus_utc()) * 1_000
    }

    /// RFC 3339 with this offset and milliseconds: how every `ts` leaves the server.
    #[must_use]
    pub fn rfc3339(self, at_ms: i64) -> String {
        self.local(at_ms).to_rfc3339_opts(chrono::SecondsFormat::Millis, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(text: &str) -> i64 {
        DateTime::parse_from_rfc3339(text).unwrap().timestamp_millis()
    }

    #[test]
    fn days_and_months_turn_at_local_midnight() {
        let zone = Zone::parse("+08:00").unwrap();
        let cases = [
            ("2026-11-23T15:59:59.999Z", "2026-11-23", "2026-11", "2026-11-23T16:00:00Z", "2026-11-30T16:00:00Z"),
            ("2026-11-23T16:00:00Z", "2026-11-24", "2026-11", "2026-11-24T16:00:00Z", "2026-11-30T16:00:00Z"),
            ("2026-12-31T16:00:00Z", "2027-01-01", "2027-01", "2027-01-01T16:00:00Z", "2027-01-31T16:00:00Z"),
            ("2028-02-28T16:00:00Z", "2028-02-29", "2028-02", "2028-02-29T16:00:00Z", "2028-02-29T16:00:00Z"),
        ];
        for (now, day, month, day_ends, month_ends) in cases {
            let now = ms(now);
            assert_eq!(zone.period(QuotaType::Daily, now), day);
            assert_eq!(zone.period(QuotaType::Monthly, now), month);
            assert_eq!(zone.resets_at(QuotaType::Daily, now), Some(ms(day_ends)));
            assert_eq!(zone.resets_at(QuotaType::Monthly, now), Some(ms(month_ends)));
            assert_eq!(zone.resets_at(QuotaType::Total, now), None);
        }
    }

    #[test]
    fn a_query_s_instant_is_read_in_local_days() {
        let zone = Zone::parse("+08:00").unwrap();
        assert_eq!(zone.instant("2026-11-23", false), Some(ms("2026-11-22T16:00:00Z")));
        assert_eq!(zone.instant("2026-11-23", true), Some(ms("2026-11-23T16:00:00Z")));
        assert_eq!(zone.instant("2026-11-23T00:00:00+08:00", true), Some(ms("2026-11-22T16:00:00Z")));
        assert_eq!(zone.instant("1795407138251", false), Some(1_795_407_138_251));
        for text in ["", "yesterday", "-5", "2026-13-01"] {
            assert_eq!(zone.instant(text, false), None, "{text}");
        }
    }

    #[test]
    fn offsets_parse_or_are_refused() {
        assert!(Zone::parse("-03:30").is_ok() && Zone::parse("Z").is_ok() && Zone::parse("+00:00").is_ok());
        for text in ["", "8", "+8:00", "+08", "+15:00", "+08:60", "Asia/Shanghai", "08:00"] {
            assert!(Zone::parse(text).is_err(), "{text}");
        }
        assert_eq!(Zone::parse("+08:00").unwrap().rfc3339(0), "1970-01-01T08:00:00.000+08:00");
    }
}
