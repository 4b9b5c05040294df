//! Where the next page of a list begins: an opaque text, good for a day, for the team and for what was asked, and made by nobody else.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use model::ids::TeamId;

use super::errors::ApiError;
use crate::secrets::{Purpose, Secret};

const LIFE: TimeDelta = TimeDelta::days(1);
/// Half of an HMAC-SHA256.
const MAC_BYTES: usize = 16;
const TIMES_BYTES: usize = 16;
/// Of all of it; ids are far shorter.
const TEXT_BYTES_MAX: usize = 256;

/// The last row of a page: those of the next one come after it.
#[derive(Debug, Clone, PartialEq)]
pub struct Last {
    pub at: DateTime<Utc>,
    pub id: String,
}

/// What a cursor is bound to: it continues no other list.
#[derive(Clone, Copy)]
pub struct Of<'a> {
    pub secret: &'a Secret,
    pub team: TeamId,
    /// Which list, and what was asked of it.
    pub asked: &'a [u8],
}

impl Of<'_> {
    pub fn cursor(self, last: &Last, now: DateTime<Utc>) -> String {
        let mut bytes = (now + LIFE).timestamp().to_be_bytes().to_vec();
        bytes.extend(last.at.timestamp_micros().to_be_bytes());
        bytes.extend(last.id.as_bytes());
        bytes.extend(self.mac(&bytes));
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// One text for all that may be wrong with it.
    pub fn read(self, text: &str, now: DateTime<Utc>) -> Result<Last, ApiError> {
        let wrong =
            || ApiError::invalid("cursor", "is not one of this list, or is older than a day; begin anew without it");
        if text.len() > TEXT_BYTES_MAX {
            return Err(wrong());
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| wrong())?;
        let length = bytes.len().checked_sub(MAC_BYTES).filter(|length| *length >= TIMES_BYTES).ok_or_else(wrong)?;
        let (said, mac) = bytes.split_at(length);
        let is_ours: bool = subtle::ConstantTimeEq::ct_eq(mac, &self.mac(said)[..]).into();
        let number = |part: &[u8]| part.try_into().map(i64::from_be_bytes).ok();
        let (ends, at) = (number(&said[..8]).ok_or_else(wrong)?, number(&said[8..16]).ok_or_else(wrong)?);
        if !is_ours || ends < now.timestamp() {
            return Err(wrong());
        }
        let at = DateTime::from_timestamp_micros(at).ok_or_else(wrong)?;
        let id = String::from_utf8(said[TIMES_BYTES..].to_vec()).map_err(|_| wrong())?;
        Ok(Last { at, id })
    }

    fn mac(self, said: &[u8]) -> [u8; MAC_BYTES] {
        let whole = self.secret.mac(Purpose::Cursors, &[self.team.0.as_bytes(), self.asked, said]);
        whole[..MAC_BYTES].try_into().expect("a part of 32 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_continues_its_own_list_for_a_day() {
        let secret = Secret::parse(&"07".repeat(32), "test").unwrap();
        let of = |team: u128, asked| Of { secret: &secret, team: TeamId(uuid::Uuid::from_u128(team)), asked };
        let now = Utc::now();
        let last = Last { at: DateTime::from_timestamp_micros(1_234_567_890_123_456).unwrap(), id: "sbx".to_owned() };
        let cursor = of(1, b"a").cursor(&last, now);
        assert_eq!(of(1, b"a").read(&cursor, now).unwrap(), last);
        assert!(of(1, b"a").read(&cursor, now + TimeDelta::hours(23)).is_ok());
        assert!(of(1, b"a").read(&cursor, now + TimeDelta::hours(25)).is_err());
        assert!(of(2, b"a").read(&cursor, now).is_err());
        assert!(of(1, b"b").read(&cursor, now).is_err());
        for position in 0..cursor.len() {
            let mut forged = cursor.clone().into_bytes();
            forged[position] = if forged[position] == b'A' { b'B' } else { b'A' };
            assert!(of(1, b"a").read(std::str::from_utf8(&forged).unwrap(), now).is_err(), "{position}");
        }
        for wrong in ["", "x", "====", &"A".repeat(22), &"A".repeat(300), "ü"] {
            assert!(of(1, b"a").read(wrong, now).is_err(), "{wrong}");
        }
    }
}
