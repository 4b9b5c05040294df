//! What is done inside the guest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use host_agent::disk::{DeviceMapper, DiskChoice, Disks, Pool, all_loops, is_store};
use nix::mount::{MsFlags, mount};

pub const TAG: &str = "0123abcd";
pub const MIB: u32 = 8;
pub const CHUNK: usize = 4096;
pub const CHUNKS: u64 = MIB as u64 * 256;
const POOL_MIB: u32 = 400;
const UID: u32 = 0x4000_1234;
/// Asks this program, started anew, for work in which it is to die.
const WORK: &str = "WRENN_TEST_WORK";

type Scene = (&'static str, fn(&Place));

#[test]
#[ignore = "runs as the init of a guest that another test boots"]
fn everything() {
    let Some(place) = Place::in_guest() else { return };
    let all: [Scene; 13] = [
        ("what is written stays, and the base as it was", stays),
        ("a disk is copied while its guest stands still", copied),
        ("a flat image holds what the device showed", flattened),
        ("a host that does without makes it flat", switched_back),
        ("a base stays as long as a disk stands on it", bases_stay),
        ("a device stays below who has it open", open_stays),
        ("a suspended device goes on", suspended_goes_on),
        ("a death at each point leaves nothing", deaths),
        ("a full pool costs the disk, and no saved state", full_pool),
        ("a flat disk is no store, whatever is written to it", forged),
        ("a start that was given up leaves nothing", given_up),
        ("what is wrong is said", wrong),
        ("deaths at any moment", crate::storm::some_deaths),
    ];
    for (what, scene) in all {
        let begin = Instant::now();
        scene(&place);
        assert_eq!(place.left(), (0, 0), "{what}: devices and loops are left");
        println!("  {what}: {} ms", begin.elapsed().as_millis());
    }
}

/// The part of a death: does as it is told until it is killed.
#[test]
#[ignore = "is started by the tests of the guest"]
fn work() {
    let Some(work) = std::env::var_os(WORK) else {
        println!("SKIPPED: runs in the guest, started by its init");
        return;
    };
    let place = Place::open_again();
    let disks = place.disks(DiskChoice::DeviceMapper, &[7]);
    let disk = place.disk("victim");
    match work.to_str().unwrap() {
        "attach" => _ = place.attach(&disks, 7, "victim").unwrap(),
        "snapshot" => disks.snapshot(7, &disk, &place.disk("copy"), MIB).unwrap(),
        "detach" => disks.detach(7).unwrap(),
        "flatten" => disks.chosen().flatten(&disk, &place.disk("flat"), UID).unwrap(),
        "storm" => crate::storm::work(&place, &disks),
        other => panic!("there is no work {other:?}"),
    }
}

/// A WRENN_DIR in memory, with a template.
pub struct Place {
    pub pool: Pool,
}

impl Place {
    /// None where this is no guest.
    pub fn in_guest() -> Option<Self> {
        if std::process::id() != 1 {
            println!("SKIPPED: runs as the init of a guest, which another test boots");
            return None;
        }
        let all =
            [("proc", "/proc", ""), ("sysfs", "/sys", ""), ("devtmpfs", "/dev", ""), ("tmpfs", "/data", "size=90%")];
        for (kind, at, options) in all {
            mount(Some(kind), at, Some(kind), MsFlags::empty(), Some(options)).unwrap();
        }
        for name in fs::read_to_string("/modules/order").unwrap().lines() {
            let module = fs::read(format!("/modules/{name}")).unwrap();
            rustix::system::init_module(&module, c"").unwrap_or_else(|error| panic!("load {name}: {error}"));
        }
        assert_eq!(DeviceMapper::missing(), None);
        publish('a');
        Some(Self::open_again())
    }

    fn open_again() -> Self {
        Self { pool: Pool::open(Path::new("/data"), Some(POOL_MIB)).unwrap() }
    }

    /// As an agent that starts, and finds these slots in its journals.
    pub fn disks(&self, choice: DiskChoice, in_use: &[u16]) -> Disks {
        DeviceMapper::resume_all(TAG).unwrap();
        Disks::open(&self.pool, TAG, &in_use.iter().copied().collect(), choice).unwrap()
    }

    pub fn disk(&self, name: &str) -> PathBuf {
        let directory = self.pool.path().join("sandboxes").join(name);
        fs::create_dir_all(&directory).unwrap();
        directory.join("disk")
    }

    pub fn node(&self, name: &str) -> PathBuf {
        self.disk(name).with_file_name("node")
    }

    pub fn make(&self, disks: &Disks, name: &str) -> PathBuf {
        let disk = self.disk(name);
        self.pool.make_disk(disks.chosen(), &"t".parse().unwrap(), MIB, &disk, UID).unwrap();
        disk
    }

    pub fn attach(&self, disks: &Disks, slot: u16, name: &str) -> io::Result<PathBuf> {
        disks.attach(slot, &self.disk(name), &self.node(name), UID, &|| true)
    }

    pub fn remove(&self, name: &str) {
        fs::remove_dir_all(self.disk(name).parent().unwrap()).unwrap();
    }

    /// Devices, and loops but the pool's own.
    pub fn left(&self) -> (usize, usize) {
        let devices = self.disks(DiskChoice::DeviceMapper, &[]).devices().unwrap().len();
        let is_disks = |file: &Path| file.starts_with(self.pool.path());
        // A loop lets go of its file a moment after its last user has.
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let loops = all_loops().unwrap().iter().filter(|(_, file)| is_disks(file)).count();
            if loops == 0 || Instant::now() > end {
                return (devices, loops);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn base(&self) -> PathBuf {
        let all: Vec<_> =
            fs::read_dir(self.pool.path().join("images")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(all.len(), 1);
        all.into_iter().next().unwrap()
    }

    /// This program again, which is to do something and die in it at a point, or later.
    pub fn begin(work: &str, point: Option<&str>) -> Child {
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", "guest::work", "--include-ignored", "--nocapture"]).env(WORK, work);
        if let Some(point) = point {
            command.env("WRENN_CRASHPOINTS", format!("{point}=abort"));
        }
        command.stdout(Stdio::null()).spawn().unwrap()
    }
}

/// An edition of the template: each chunk tells its place and the edition.
fn publish(edition: char) {
    fs::create_dir_all("/data/images/t").unwrap();
    let content: Vec<u8> = (0..CHUNKS).flat_map(|at| chunk(edition, at)).collect();
    fs::write("/data/images/t/rootfs.ext4", content).unwrap();
    fs::write("/data/images/t/digest", format!("{}\n", edition.to_string().repeat(64))).unwrap();
}

/// What is written at a place.
pub fn chunk(mark: char, at: u64) -> Vec<u8> {
    let mut content = format!("{mark} {at} ").into_bytes();
    content.resize(CHUNK, u8::try_from(u32::from(mark)).unwrap());
    content
}

pub fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn write(device: &File, mark: char, at: u64) {
    device.write_all_at(&chunk(mark, at), at * CHUNK as u64).unwrap();
}

/// The mark of each chunk, which is whole.
pub fn marks(file: &File) -> Vec<char> {
    let mut content = vec![0; CHUNK];
    let mut mark = |at: u64| {
        file.read_exact_at(&mut content, at * CHUNK as u64).unwrap();
        let mark = char::from(content[0]);
        assert!(content == chunk(mark, at), "chunk {at} is torn or another's");
        mark
    };
    (0..CHUNKS).map(&mut mark).collect()
}

fn written(marks: &[char], mark: char) -> Vec<usize> {
    marks.iter().enumerate().filter(|(_, found)| **found == mark).map(|(at, _)| at).collect()
}

fn stays(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let begin = Instant::now();
    let one = place.make(&disks, "one");
    place.make(&disks, "two");
    let made = begin.elapsed();
    assert!(is_store(&File::open(&one).unwrap()).unwrap());
    let begin = Instant::now();
    let device = place.attach(&disks, 1, "one").unwrap();
    println!("  two disks made in {} us, one attached in {} us", made.as_micros(), begin.elapsed().as_micros());
    let about = fs::metadata(&device).unwrap();
    assert!(about.file_type().is_block_device());
    assert_eq!((about.uid(), about.mode() & 0o777), (UID, 0o600));
    let other = place.attach(&disks, 2, "two").unwrap();
    assert_eq!(
        all_loops().unwrap().iter().filter(|(_, file)| *file == place.base()).count(),
        1,
        "the base is shown once"
    );
    let (file, second) = (open(&device), open(&other));
    assert!(marks(&file).iter().all(|mark| *mark == 'a'));
    for at in [0, 3, 4, 5, 700, CHUNKS - 1] {
        write(&file, 'b', at);
    }
    // In part of a chunk the rest is the base's.
    file.write_all_at(&[7; 512], 9 * CHUNK as u64 + 512).unwrap();
    file.sync_all().unwrap();
    write(&second, 'c', 3);
    drop((file, second));
    disks.detach(1).unwrap();
    disks.detach(1).unwrap();
    disks.detach(2).unwrap();
    assert!(fs::metadata(&one).unwrap().blocks() * 512 < 4 << 20, "it takes what was written");
    let device = open(&place.attach(&disks, 3, "one").unwrap());
    let mut part = chunk('a', 9);
    part[512..1024].fill(7);
    let mut found = vec![0; CHUNK];
    device.read_exact_at(&mut found, 9 * CHUNK as u64).unwrap();
    assert!(found == part);
    write(&device, 'b', 9);
    assert_eq!(written(&marks(&device), 'b'), [0, 3, 4, 5, 9, 700, usize::try_from(CHUNKS).unwrap() - 1]);
    drop(device);
    disks.detach(3).unwrap();
    assert!(marks(&open(&place.base())).iter().all(|mark| *mark == 'a'));
    for name in ["one", "two"] {
        place.remove(name);
    }
}

fn copied(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let disk = place.make(&disks, "one");
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    for at in 100..400 {
        write(&device, 'b', at);
    }
    // Nothing of it was synced: a copy holds it all the same.
    let begin = Instant::now();
    disks.snapshot(1, &disk, &place.disk("copy"), MIB).unwrap();
    println!("  copied in {} us", begin.elapsed().as_micros());
    for at in 0..200 {
        write(&device, 'c', at);
    }
    disks.flush(1, &disk).unwrap();
    disks.restore(&place.disk("copy"), &place.disk("child"), UID).unwrap();
    let child = open(&place.attach(&disks, 2, "child").unwrap());
    let found = marks(&child);
    assert_eq!(written(&found, 'b'), (100..400).collect::<Vec<_>>());
    write(&child, 'd', 7);
    let found = marks(&device);
    assert_eq!((written(&found, 'b').len(), written(&found, 'c').len(), written(&found, 'd').len()), (200, 200, 0));
    drop((device, child));
    disks.detach(1).unwrap();
    disks.detach(2).unwrap();
    for name in ["one", "copy", "child"] {
        place.remove(name);
    }
}

fn flattened(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let disk = place.make(&disks, "one");
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    // More than an area of the kernel's, forwards, backwards, some twice, some after another flush.
    for at in (0..CHUNKS).step_by(3).chain((1..CHUNKS).rev().step_by(7)).chain(50..90) {
        write(&device, 'b', at);
    }
    device.sync_all().unwrap();
    for at in (2..CHUNKS).step_by(13) {
        write(&device, 'c', at);
    }
    let shown = marks(&device);
    drop(device);
    disks.detach(1).unwrap();
    let flat = place.disk("flat");
    let begin = Instant::now();
    disks.chosen().flatten(&disk, &flat, UID).unwrap();
    println!(
        "  {} of {CHUNKS} chunks made flat in {} us",
        CHUNKS as usize - written(&shown, 'a').len(),
        begin.elapsed().as_micros()
    );
    assert!(marks(&open(&flat)) == shown);
    let about = fs::metadata(&flat).unwrap();
    assert_eq!((about.len(), about.uid()), (u64::from(MIB) << 20, UID));
    // It stands by itself.
    place.remove("one");
    assert!(marks(&open(&flat)) == shown);
    place.remove("flat");
}

fn switched_back(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let disk = place.make(&disks, "one");
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    write(&device, 'b', 11);
    // The agent is started anew with the other driver; what runs goes on.
    drop(disks);
    let disks = place.disks(DiskChoice::Reflink, &[1]);
    disks.snapshot(1, &disk, &place.disk("saved"), MIB).unwrap();
    write(&device, 'c', 12);
    drop(device);
    disks.detach(1).unwrap();
    let flat = place.disk("flat");
    disks.restore(&place.disk("saved"), &flat, UID).unwrap();
    assert_eq!(place.attach(&disks, 2, "flat").unwrap(), flat, "a file needs no device");
    let found = marks(&open(&flat));
    assert_eq!((written(&found, 'b'), written(&found, 'c')), (vec![11], vec![]));
    // And back: what is flat stays so.
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    disks.restore(&flat, &place.disk("again"), UID).unwrap();
    assert!(!is_store(&File::open(place.disk("again")).unwrap()).unwrap());
    for name in ["one", "saved", "flat", "again"] {
        place.remove(name);
    }
}

fn bases_stay(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    place.make(&disks, "one");
    let old = place.base();
    publish('e');
    assert_eq!(place.pool.remove_unused_bases().unwrap(), 0);
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    assert!(marks(&device).iter().all(|mark| *mark == 'a'));
    drop(device);
    disks.detach(1).unwrap();
    place.remove("one");
    assert_eq!(place.pool.remove_unused_bases().unwrap(), 1);
    assert!(!old.exists());
    publish('a');
}

fn open_stays(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    place.make(&disks, "one");
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    // An agent that knows nothing of it.
    let stranger = place.disks(DiskChoice::DeviceMapper, &[]);
    assert_eq!(stranger.devices().unwrap(), [1]);
    write(&device, 'b', 1);
    device.sync_all().unwrap();
    let refused = place.attach(&disks, 1, "one").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ResourceBusy, "not below who has it open");
    write(&device, 'b', 2);
    drop(device);
    assert_eq!(place.disks(DiskChoice::DeviceMapper, &[]).devices().unwrap(), Vec::<u16>::new());
    place.remove("one");
}

fn suspended_goes_on(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    place.make(&disks, "victim");
    let device = open(&place.attach(&disks, 7, "victim").unwrap());
    write(&device, 'b', 1);
    let died = Place::begin("snapshot", Some("disk.snapshot.suspended")).wait().unwrap();
    assert_eq!(died.signal(), Some(libc::SIGKILL));
    // What a VMM writes now waits, and so does its end.
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        write(&device, 'c', 2);
        device.sync_all().unwrap();
        drop(device);
        done.send(()).unwrap();
    });
    assert!(ended.recv_timeout(Duration::from_millis(300)).is_err(), "it was not suspended");
    let disks = place.disks(DiskChoice::DeviceMapper, &[7]);
    ended.recv_timeout(Duration::from_secs(5)).expect("it goes on");
    disks.detach(7).unwrap();
    place.remove("victim");
    place.remove("copy");
}

fn deaths(place: &Place) {
    let points = [
        ("attach", "disk.attach.looped"),
        ("attach", "disk.attach.mapped"),
        ("snapshot", "disk.snapshot.suspended"),
        ("snapshot", "disk.snapshot.copied"),
        ("detach", "disk.detach.removed"),
        ("flatten", "disk.flatten.cloned"),
    ];
    for (work, point) in points {
        for is_known in [true, false] {
            let disks = place.disks(DiskChoice::DeviceMapper, &[]);
            place.make(&disks, "victim");
            if work != "attach" {
                let device = open(&place.attach(&disks, 7, "victim").unwrap());
                write(&device, 'b', 5);
                drop(device);
            }
            if work == "flatten" {
                disks.detach(7).unwrap();
            }
            drop(disks);
            let died = Place::begin(work, Some(point)).wait().unwrap();
            assert_eq!(died.signal(), Some(libc::SIGKILL), "{point} was not met");
            // The next agent takes it down, whether or not its journals name the slot.
            let in_use: &[u16] = if is_known { &[7] } else { &[] };
            let disks = place.disks(DiskChoice::DeviceMapper, in_use);
            disks.detach(7).unwrap();
            assert_eq!(place.left(), (0, 0), "{point}");
            let device = open(&place.attach(&disks, 7, "victim").unwrap());
            let expected = if work == "attach" { vec![] } else { vec![5] };
            assert_eq!(written(&marks(&device), 'b'), expected, "{point}");
            drop(device);
            disks.detach(7).unwrap();
            place.remove("victim");
        }
    }
    for name in ["copy", "flat"] {
        place.remove(name);
    }
}

fn full_pool(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let disk = place.make(&disks, "one");
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    for at in 0..20 {
        write(&device, 'b', at);
    }
    device.sync_all().unwrap();
    disks.snapshot(1, &disk, &place.disk("before"), MIB).unwrap();
    let copy = place.disk("copy");
    let ballast = place.pool.path().join("ballast");
    let file = File::create(&ballast).unwrap();
    // To the last block.
    let mut taken = 0;
    for step in [64 << 20, 1 << 20, 64 << 10, 4096_u64] {
        while rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), taken, step).is_ok() {
            taken += step;
        }
    }
    // The kernel takes these: it has not looked for room yet.
    for at in 20..CHUNKS {
        write(&device, 'c', at);
    }
    // A copy would lack them, and who wrote them was told nothing: there is none.
    let refused = disks.snapshot(1, &disk, &copy, MIB).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::StorageFull, "{refused}");
    assert!(!copy.exists());
    drop(file);
    fs::remove_file(&ballast).unwrap();
    assert!(disks.snapshot(1, &disk, &copy, MIB).is_err(), "room alone brings nothing back");
    disks.flush(1, &disk).unwrap();
    drop(device);
    disks.detach(1).unwrap();
    // What was saved before is whole, and goes on.
    disks.restore(&place.disk("before"), &place.disk("one"), UID).unwrap();
    let device = open(&place.attach(&disks, 1, "one").unwrap());
    assert_eq!(written(&marks(&device), 'b').len(), 20);
    for at in 20..40 {
        write(&device, 'd', at);
    }
    device.sync_all().unwrap();
    drop(device);
    disks.detach(1).unwrap();
    for name in ["one", "before", "copy"] {
        place.remove(name);
    }
}

/// A VMM that was taken over writes behind the end of its disk: what it writes there is not taken for a store.
fn forged(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    place.make(&disks, "store");
    let disks = place.disks(DiskChoice::Reflink, &[]);
    let flat = place.make(&disks, "flat");
    assert_eq!(place.attach(&disks, 5, "flat").unwrap(), flat);
    disks.snapshot(5, &flat, &place.disk("honest"), MIB).unwrap();
    fs::copy(place.disk("store"), &flat).unwrap();
    let refused = disks.snapshot(5, &flat, &place.disk("copy"), MIB).unwrap_err();
    assert!(refused.to_string().contains("larger or smaller"), "{refused}");
    assert!(!place.disk("copy").exists());
    for name in ["store", "flat", "honest", "copy"] {
        place.remove(name);
    }
}

/// A start that was given up, and comes to its turn when the sandbox has been taken down.
fn given_up(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let disk = place.make(&disks, "one");
    let refused = disks.attach(1, &disk, &place.node("one"), UID, &|| false).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::Interrupted);
    assert_eq!(disks.devices().unwrap(), Vec::<u16>::new());
    // A flat disk in a slot whose last user was not taken down has nothing of that one.
    place.attach(&disks, 1, "one").unwrap();
    let flat = place.disk("flat");
    disks.chosen().flatten(&disk, &flat, UID).unwrap();
    assert_eq!(place.attach(&disks, 1, "flat").unwrap(), flat);
    assert_eq!(disks.devices().unwrap(), Vec::<u16>::new());
    for name in ["one", "flat"] {
        place.remove(name);
    }
}

fn wrong(place: &Place) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    let refusal = |name: &str| place.attach(&disks, 4, name).unwrap_err().to_string();
    let disk = place.make(&disks, "one");
    open(&disk).write_all_at(b"nonsense", 0).unwrap();
    assert!(refusal("one").contains("damaged"), "{}", refusal("one"));
    let disk = place.make(&disks, "one");
    open(&disk).write_all_at(b"nonsense", 4096).unwrap();
    assert!(refusal("one").contains("device-mapper"), "{}", refusal("one"));
    place.make(&disks, "one");
    let (base, away) = (place.base(), place.pool.path().join("away"));
    fs::rename(&base, &away).unwrap();
    assert!(refusal("one").contains("cannot be had"), "{}", refusal("one"));
    // Made again, it has other times in its head.
    let mut other = fs::read(&away).unwrap();
    other[1024] ^= 1;
    fs::write(&base, other).unwrap();
    assert!(refusal("one").contains("another one"), "{}", refusal("one"));
    assert!(disks.chosen().flatten(&place.disk("one"), &place.disk("flat"), UID).is_err());
    fs::rename(&away, &base).unwrap();
    assert!(refusal("unknown").contains("No such file"), "{}", refusal("unknown"));
    let slots: BTreeSet<u16> = disks.devices().unwrap().into_iter().collect();
    assert!(slots.is_empty());
    for name in ["one", "unknown", "flat"] {
        place.remove(name);
    }
}
