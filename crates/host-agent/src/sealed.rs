//! Small files that are whole or not at all: a record in JSON with the version of its format and a checksum around it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("it is not whole: {0}")]
    Damaged(String),
    #[error("it has format {0}")]
    Format(u32),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    format: u32,
    /// BLAKE3 of the text of `record`.
    checksum: String,
    #[serde(borrow)]
    record: &'a RawValue,
}

/// Read first: what stands beside it is another format's business.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

pub fn encode<T: Serialize>(format: u32, record: &T) -> Vec<u8> {
    let body =
        serde_json::value::to_raw_value(record).expect("a record has only text, numbers and maps with text keys");
    let checksum = blake3::hash(body.get().as_bytes()).to_hex().to_string();
    serde_json::to_vec(&Envelope { format, checksum, record: &body }).expect("an envelope has only text and numbers")
}

pub fn decode<T: DeserializeOwned>(format: u32, bytes: &[u8]) -> Result<T, Broken> {
    let damaged =
        |error: serde_json::Error| Broken::Damaged(format!("line {} column {}", error.line(), error.column()));
    let head: Head = serde_json::from_slice(bytes).map_err(damaged)?;
    if head.format != format {
        return Err(Broken::Format(head.format));
    }
    let envelope: Envelope<'_> = serde_json::from_slice(bytes).map_err(damaged)?;
    if blake3::hash(envelope.record.get().as_bytes()).to_hex().as_str() != envelope.checksum {
        return Err(Broken::Damaged("the checksum differs".to_owned()));
    }
    serde_json::from_str(envelope.record.get()).map_err(damaged)
}
