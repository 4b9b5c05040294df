//! The file of a snapshot's device state: magic, format version, length, JSON, CRC.
//!
//! As with the real one the CRC finds damage and proves nothing, and a file of another format version is refused.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::Configuration;

const MAGIC: &[u8; 8] = b"SIMULATE";
const HEADER: usize = 8 + 4 + 8;
const CRC: usize = 8;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceState {
    pub configuration: Configuration,
    /// Of the guest's ticks.
    pub counter: u64,
    /// Of its whole memory, as it was at the snapshot.
    pub memory_digest: String,
    pub pci: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("Failed to open snapshot file: {0}")]
    Open(#[source] io::Error),
    #[error("Failed to load snapshot state from file: An error occurred during bitcode serialization: bitcode error")]
    Malformed,
    #[error("Failed to load snapshot state from file: Magic value does not match arch: {0}")]
    Magic(u64),
    #[error("Failed to load snapshot state from file: Invalid data version: {0}.0.0")]
    Version(u32),
    #[error("Failed to load snapshot state from file: CRC64 validation failed")]
    Crc,
}

#[derive(Debug, thiserror::Error)]
pub enum Unwritable {
    #[error("Cannot perform {0} on the snapshot backing file: {1}")]
    File(&'static str, #[source] io::Error),
    #[error("Cannot serialize the microVM state: {0}")]
    Json(#[source] serde_json::Error),
    #[error("Cannot serialize the microVM state: IO Error: {0}")]
    Write(#[source] io::Error),
}

pub fn write(path: &Path, format: u32, state: &DeviceState) -> Result<(), Unwritable> {
    let json = serde_json::to_vec(state).map_err(Unwritable::Json)?;
    let mut bytes = Vec::with_capacity(HEADER + json.len() + CRC);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&format.to_le_bytes());
    bytes.extend_from_slice(&(json.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes.extend_from_slice(&crc64(&bytes).to_le_bytes());

    let mut file = File::create(path).map_err(|e| Unwritable::File("open", e))?;
    file.write_all(&bytes).map_err(Unwritable::Write)?;
    file.sync_all().map_err(|e| Unwritable::File("sync_all", e))
}

/// The format version of a file, whatever it is.
pub fn format_of(path: &Path) -> Result<u32, Unreadable> {
    let bytes = std::fs::read(path).map_err(Unreadable::Open)?;
    header(&bytes).map(|(format, _)| format)
}

pub fn read(path: &Path, format: u32) -> Result<DeviceState, Unreadable> {
    let bytes = std::fs::read(path).map_err(Unreadable::Open)?;
    let (found, length) = header(&bytes)?;
    if found != format {
        return Err(Unreadable::Version(found));
    }
    let end =
        usize::try_from(length).ok().and_then(|length| HEADER.checked_add(length)).ok_or(Unreadable::Malformed)?;
    let json = bytes.get(HEADER..end).ok_or(Unreadable::Malformed)?;
    let crc = bytes.get(end..end.saturating_add(CRC)).ok_or(Unreadable::Malformed)?;
    if crc != crc64(&bytes[..end]).to_le_bytes() {
        return Err(Unreadable::Crc);
    }
    serde_json::from_slice(json).map_err(|_| Unreadable::Malformed)
}

fn header(bytes: &[u8]) -> Result<(u32, u64), Unreadable> {
    let magic: [u8; 8] = bytes.get(..8).and_then(|part| part.try_into().ok()).ok_or(Unreadable::Malformed)?;
    let format = bytes.get(8..12).and_then(|part| part.try_into().ok()).ok_or(Unreadable::Malformed)?;
    let length = bytes.get(12..HEADER).and_then(|part| part.try_into().ok()).ok_or(Unreadable::Malformed)?;
    if &magic != MAGIC {
        return Err(Unreadable::Magic(u64::from_le_bytes(magic)));
    }
    Ok((u32::from_le_bytes(format), u64::from_le_bytes(length)))
}

/// ECMA-182, bit by bit: a state file has a few kilobytes.
fn crc64(bytes: &[u8]) -> u64 {
    const POLYNOMIAL: u64 = 0x42f0_e1eb_a9ea_3693;
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(
            crc ^ (u64::from(*byte) << 56),
            |crc, _| {
                if crc >> 63 == 1 { (crc << 1) ^ POLYNOMIAL } else { crc << 1 }
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let state = DeviceState {
            configuration: Configuration::default(),
            counter: 7,
            memory_digest: "d".to_owned(),
            pci: false,
        };
        write(&path, 11, &state).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(read(&path, 11).unwrap().counter, 7);
        assert_eq!(format_of(&path).unwrap(), 11);
        assert!(matches!(read(&path, 10), Err(Unreadable::Version(11))));

        for length in [0, 7, 15, HEADER, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(read(&path, 11), Err(Unreadable::Malformed)), "{length} bytes");
        }
        let mut flipped = whole;
        flipped[HEADER + 3] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        assert!(matches!(read(&path, 11), Err(Unreadable::Crc)));
    }

    #[test]
    fn the_check_sum_is_the_published_one() {
        assert_eq!(crc64(b"123456789"), 0x6c40_df5f_0b49_7347);
    }
}
