//! Three rings of points, from fine to coarse, of one sandbox: ten minutes by 5 s, two hours by 30 s, a day by 5 min. They only grow as far as
//! there is something to keep: ten kilobytes of a sandbox that has run for a day.

use std::collections::VecDeque;

/// How often a sandbox is looked at.
pub const LOOK_SECONDS: u32 = 5;
/// Seconds between points, and how many points.
const FINE: (u32, usize) = (LOOK_SECONDS, 120);
const MIDDLE: (u32, usize) = (30, 240);
const COARSE: (u32, usize) = (300, 288);

/// The first bytes of a file. Another format is another word.
const FORMAT: &[u8; 8] = b"wrenn-g1";
const POINT_BYTES: usize = 16;
/// The most that a file can have.
pub const FILE_BYTES_MAX: u64 = 16 * 1024;

/// What was taken at one time, or on the average of the time that began then.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Point {
    /// Unix seconds.
    pub at: u32,
    /// Of all vCPUs together, 0 to 100.
    pub cpu_pct: f32,
    pub memory_kib: u32,
    pub disk_kib: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Rings {
    fine: VecDeque<Point>,
    middle: Averages,
    coarse: Averages,
}

/// Points that are averages of finer ones.
#[derive(Debug, Clone, PartialEq)]
struct Averages {
    seconds: u32,
    points_max: usize,
    points: VecDeque<Point>,
    /// What has come of the present one so far.
    open: Sum,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sum {
    at: u32,
    count: u32,
    cpu_pct: f64,
    memory_kib: u64,
    disk_kib: u64,
}

impl Default for Rings {
    fn default() -> Self {
        Self { fine: VecDeque::new(), middle: Averages::new(MIDDLE), coarse: Averages::new(COARSE) }
    }
}

impl Rings {
    pub fn push(&mut self, point: Point) {
        push(&mut self.fine, point, FINE.1);
        self.middle.push(point);
        self.coarse.push(point);
    }

    /// The finest points that are kept for so long, of the last `seconds` up to `until`, oldest first.
    pub fn points(&self, seconds: u32, until: u32) -> Vec<Point> {
        let reach = |(seconds, count): (u32, usize)| seconds.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX));
        let from = until.saturating_sub(seconds);
        let kept = |point: &Point| point.at >= from;
        if seconds <= reach(FINE) {
            self.fine.iter().copied().filter(kept).collect()
        } else if seconds <= reach(MIDDLE) {
            self.middle.all().filter(kept).collect()
        } else {
            self.coarse.all().filter(kept).collect()
        }
    }

    pub fn last_at(&self) -> Option<u32> {
        self.fine.back().map(|point| point.at)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = FORMAT.to_vec();
        let rings: [Vec<Point>; 3] =
            [self.fine.iter().copied().collect(), self.middle.all().collect(), self.coarse.all().collect()];
        for ring in rings {
            bytes.extend(u32::try_from(ring.len()).unwrap_or_default().to_le_bytes());
            for point in ring {
                for part in [point.at, point.cpu_pct.to_bits(), point.memory_kib, point.disk_kib] {
                    bytes.extend(part.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// None for what is not whole: a file that was not on the disk yet when the power went.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(FORMAT)?;
        let mut rings = Self { fine: take_ring(&mut rest, FINE.1)?, ..Self::default() };
        rings.middle.points = take_ring(&mut rest, MIDDLE.1 + 1)?;
        rings.coarse.points = take_ring(&mut rest, COARSE.1 + 1)?;
        rest.is_empty().then_some(rings)
    }
}

impl Averages {
    fn new((seconds, points_max): (u32, usize)) -> Self {
        Self { seconds, points_max, points: VecDeque::new(), open: Sum::default() }
    }

    fn push(&mut self, point: Point) {
        let at = point.at - point.at % self.seconds;
        if self.open.count > 0 && self.open.at != at {
            let closed = self.open.average();
            push(&mut self.points, closed, self.points_max);
            self.open = Sum::default();
        }
        self.open.add(at, point);
    }

    fn all(&self) -> impl Iterator<Item = Point> {
        let open = (self.open.count > 0).then(|| self.open.average());
        self.points.iter().copied().chain(open)
    }
}

impl Sum {
    fn add(&mut self, at: u32, point: Point) {
        self.at = at;
        self.count += 1;
        self.cpu_pct += f64::from(point.cpu_pct);
        self.memory_kib += u64::from(point.memory_kib);
        self.disk_kib += u64::from(point.disk_kib);
    }

    fn average(&self) -> Point {
        let count = u64::from(self.count.max(1));
        let whole = |sum: u64| u32::try_from(sum / count).unwrap_or(u32::MAX);
        Point {
            at: self.at,
            cpu_pct: (self.cpu_pct / f64::from(self.count.max(1))) as f32,
            memory_kib: whole(self.memory_kib),
            disk_kib: whole(self.disk_kib),
        }
    }
}

fn push(ring: &mut VecDeque<Point>, point: Point, points_max: usize) {
    while ring.len() >= points_max {
        ring.pop_front();
    }
    ring.push_back(point);
}

fn take_ring(bytes: &mut &[u8], points_max: usize) -> Option<VecDeque<Point>> {
    let count = usize::try_from(take_u32(bytes)?).ok().filter(|count| *count <= points_max)?;
    if bytes.len() < count * POINT_BYTES {
        return None;
    }
    (0..count)
        .map(|_| {
            Some(Point {
                at: take_u32(bytes)?,
                cpu_pct: f32::from_bits(take_u32(bytes)?),
                memory_kib: take_u32(bytes)?,
                disk_kib: take_u32(bytes)?,
            })
        })
        .collect()
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (first, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*first))
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u32 = 1_800_000_000;

    fn after(seconds: u32) -> Rings {
        let mut rings = Rings::default();
        for n in (0..seconds).step_by(5) {
            rings.push(Point { at: START + n, cpu_pct: (n % 60) as f32, memory_kib: n, disk_kib: 7 });
        }
        rings
    }

    #[test]
    fn each_range_has_the_finest_points_that_reach_so_far() {
        let day = after(2 * 86_400);
        let now = day.last_at().unwrap();
        for (range, count, seconds) in [
            (300, 61, 5),
            (600, 120, 5),
            (3600, 120, 30),
            (7200, 240, 30),
            (6 * 3600, 72, 300),
            (12 * 3600, 144, 300),
            (24 * 3600, 288, 300),
        ] {
            let points = day.points(range, now);
            assert_eq!(points.len(), count, "{range}");
            assert!(points.windows(2).all(|pair| pair[1].at - pair[0].at == seconds), "{range}");
            assert!(points[0].at >= now - range, "{range}");
        }
        let average = day.points(7200, now)[0];
        assert_eq!(average.disk_kib, 7);
        assert!((average.cpu_pct - 12.5).abs() < 0.01 || (average.cpu_pct - 42.5).abs() < 0.01, "{average:?}");
    }

    #[test]
    fn a_young_sandbox_has_points_in_each_range() {
        let young = after(10);
        for range in [300, 7200, 86_400] {
            assert!(!young.points(range, START + 10).is_empty(), "{range}");
        }
        assert!(Rings::default().points(300, START).is_empty());
        assert_eq!(after(0).last_at(), None);
    }

    #[test]
    fn what_is_written_is_read() {
        for seconds in [0, 5, 100, 2 * 86_400] {
            let rings = after(seconds);
            let bytes = rings.to_bytes();
            assert!(bytes.len() as u64 <= FILE_BYTES_MAX);
            let read = Rings::of_bytes(&bytes).unwrap();
            let now = rings.last_at().unwrap_or(START);
            for range in [300, 7200, 86_400] {
                assert_eq!(read.points(range, now), rings.points(range, now), "{seconds} {range}");
            }
            for cut in [0, 7, 8, 11, bytes.len() - 1] {
                assert!(Rings::of_bytes(&bytes[..cut]).is_none(), "{seconds} {cut}");
            }
            assert!(Rings::of_bytes(&[&bytes[..], b"x"].concat()).is_none());
        }
        let mut large = FORMAT.to_vec();
        large.extend(u32::MAX.to_le_bytes());
        assert!(Rings::of_bytes(&large).is_none());
    }
}
