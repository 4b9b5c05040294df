//! The program: reads its arguments, makes the one-threaded runtime, serves for ever.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;

use envd::server;

/// A thousand connections that wait for something have two buffers each, which this one does not touch. ADR 0003.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Hyper's buffers are of 8 KiB. By default each is a slab of its own, with 128 bytes of bookkeeping and more; here eight share one.
#[unsafe(export_name = "_rjem_malloc_conf")]
static ALLOCATOR_OPTIONS: Option<&'static std::ffi::c_char> = Some({
    let options = c"slab_sizes:8192-8192:16";
    // SAFETY: it points to the text's first byte, and the text is static.
    unsafe { &*options.as_ptr() }
});

struct Arguments {
    port: u16,
    standalone: bool,
    forwards_at: Option<IpAddr>,
}

const USAGE: &str = "usage: envd [--port N] [--standalone] [--forward-at ADDRESS] [--version]\n  --standalone  outside a sandbox, for tests: loopback only, no identity, no token until /init\n  --forward-at  where servers on loopback become reachable; a sandbox's is the address that its host speaks to";

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            println!("envd {}", api::guest::VERSION);
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprintln!("{message}\n{USAGE}");
            return ExitCode::from(64);
        }
    };
    // The kernel shall take a runaway process before it takes envd; without the right to ask for that, it runs all the same.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    envd::process::spawn::raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(16).build();
    let served = runtime.and_then(|runtime| {
        let address = if arguments.standalone { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
        runtime.block_on(server::serve(
            SocketAddr::from((address, arguments.port)),
            arguments.standalone,
            arguments.forwards_at,
        ))
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("envd: {e}");
            ExitCode::FAILURE
        }
    }
}

/// `None` when only the version is asked for.
fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Arguments>, String> {
    let mut arguments = Arguments { port: api::guest::PORT, standalone: false, forwards_at: None };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--standalone" => arguments.standalone = true,
            "--version" => return Ok(None),
            "--port" => {
                let value = words.next().ok_or("--port needs a number")?;
                arguments.port = value.parse().map_err(|_| format!("{value} is not a port"))?;
            }
            "--forward-at" => {
                let value = words.next().ok_or("--forward-at needs an address")?;
                arguments.forwards_at = Some(value.parse().map_err(|_| format!("{value} is no address"))?);
            }
            other => return Err(format!("unknown argument {other}")),
        }
    }
    Ok(Some(arguments))
}
