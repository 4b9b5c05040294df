//! Where a file's data lies on the disk: what of it is shared with another file, and so has not changed since it was cloned from that one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

/// Pieces in which files are compared, and of which digests are kept.
pub const PIECE: u64 = 1 << 20;

/// linux/fiemap.h: _IOWR('f', 11, struct fiemap)
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
const FLAG_SYNC: u32 = 1;
const EXTENT_LAST: u32 = 0x1;
/// What has no place yet, or none that can be compared (unknown, delayed, encoded, inside metadata, a tail).
const EXTENT_NOWHERE: u32 = 0x2 | 0x4 | 0x8 | 0x200 | 0x400;
/// Reserved and never written: zeros.
const EXTENT_UNWRITTEN: u32 = 0x800;
const EXTENTS_AT_ONCE: usize = 512;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS_AT_ONCE],
}

/// A stretch of data that lies in one place; None: nobody can say where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    begin: u64,
    end: u64,
    place: Option<u64>,
}

/// The numbers of the pieces that hold data.
pub fn data(file: &File) -> io::Result<BTreeSet<u64>> {
    Ok(stretches(file)?.iter().flat_map(pieces).collect())
}

/// The numbers of the pieces whose data does not lie where the other file's does, also where only the other one has some.
pub fn differing(file: &File, other: &File) -> io::Result<BTreeSet<u64>> {
    let (own, theirs) = (cut(&stretches(file)?), cut(&stretches(other)?));
    let is_alone = |one: &Stretch, all: &[Stretch]| {
        one.place.is_none() || all.binary_search_by_key(&one.begin, |other| other.begin).map(|at| all[at]) != Ok(*one)
    };
    let mut found: BTreeSet<u64> = BTreeSet::new();
    found.extend(own.iter().filter(|one| is_alone(one, &theirs)).map(|one| one.begin / PIECE));
    found.extend(theirs.iter().filter(|one| is_alone(one, &own)).map(|one| one.begin / PIECE));
    Ok(found)
}

fn pieces(stretch: &Stretch) -> std::ops::Range<u64> {
    stretch.begin / PIECE..stretch.end.div_ceil(PIECE)
}

/// None goes beyond its piece, so that the same data is cut the same way in both files.
fn cut(all: &[Stretch]) -> Vec<Stretch> {
    let parts = |one: &Stretch| {
        let one = *one;
        pieces(&one).map(move |piece| {
            let (begin, end) = (one.begin.max(piece * PIECE), one.end.min((piece + 1) * PIECE));
            Stretch { begin, end, place: one.place.map(|place| place + (begin - one.begin)) }
        })
    };
    all.iter().flat_map(parts).collect()
}

/// In order, and none that could be joined with the next.
fn stretches(file: &File) -> io::Result<Vec<Stretch>> {
    let size = file.metadata()?.len();
    let mut found: Vec<Stretch> = Vec::new();
    let mut at = 0;
    while at < size {
        let mut request = Box::new(Request {
            start: at,
            length: size - at,
            flags: FLAG_SYNC,
            mapped: 0,
            count: EXTENTS_AT_ONCE as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS_AT_ONCE],
        });
        // SAFETY: the descriptor is open, and the request says how many extents there is room for.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut *request) } != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                // A file system that tells nobody: all of it may be data, anywhere.
                Some(libc::EOPNOTSUPP | libc::ENOTTY) => Ok(vec![Stretch { begin: 0, end: size, place: None }]),
                _ => Err(error),
            };
        }
        let extents = &request.extents[..request.mapped as usize];
        let Some(last) = extents.last() else { break };
        for extent in extents.iter().filter(|extent| extent.flags & EXTENT_UNWRITTEN == 0) {
            let place = (extent.flags & EXTENT_NOWHERE == 0).then_some(extent.physical);
            let end = (extent.logical + extent.length).min(size);
            let one = Stretch { begin: extent.logical, end, place };
            match found.last_mut() {
                Some(before) if goes_on(before, &one) => before.end = one.end,
                _ if one.begin < one.end => found.push(one),
                _ => {}
            }
        }
        if last.flags & EXTENT_LAST != 0 {
            break;
        }
        at = last.logical + last.length;
    }
    Ok(found)
}

fn goes_on(before: &Stretch, next: &Stretch) -> bool {
    let is_beside = before.place.zip(next.place).is_some_and(|(a, b)| a + (before.end - before.begin) == b);
    before.end == next.begin && (is_beside || (before.place.is_none() && next.place.is_none()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn equal_stretches_are_cut_equally() {
        let one = |begin, end, place| Stretch { begin, end, place: Some(place) };
        let whole = [one(0, 3 * PIECE, 100)];
        let parts = [one(0, PIECE, 100), one(PIECE, 3 * PIECE, 100 + PIECE)];
        assert_eq!(cut(&whole), cut(&parts));
        assert!(goes_on(&parts[0], &parts[1]) && !goes_on(&parts[1], &parts[0]));
        assert!(!goes_on(&one(0, PIECE, 100), &one(PIECE, 2 * PIECE, 100)));
        assert_eq!(pieces(&one(PIECE - 1, PIECE + 1, 0)), 0..2);
    }

    #[test]
    fn holes_hold_nothing_and_what_was_written_differs() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let file = File::options().read(true).write(true).create_new(true).open(dir.path().join(name)).unwrap();
            file.set_len(8 * PIECE).unwrap();
            (&file).write_all(b"first").unwrap();
            file.write_all_at(b"fifth", 5 * PIECE + 17).unwrap();
            file.sync_all().unwrap();
            file
        };
        let (one, other) = (make("one"), make("other"));
        let data = data(&one).unwrap();
        let is_told = data.len() < 8;
        if !is_told {
            eprintln!("skipped in part: this file system does not tell where data lies");
        }
        assert!(data.contains(&0) && data.contains(&5));
        // Written apart they lie apart.
        assert!(differing(&one, &other).unwrap().is_superset(&[0, 5].into()));
        assert!(!is_told || differing(&one, &one).unwrap().is_empty());
    }
}
