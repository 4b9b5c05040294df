//! What proves that a guest boots here, whichever VMM runs it.

use std::time::Duration;

/// With KVM a kernel gets to its end without a root disk within a second.
pub const BOOT_LIMIT: Duration = Duration::from_secs(6);
/// What the kernel says when it has come as far as looking for its root disk, or the initramfs when it has not found one. Not just any
/// panic: a kernel that dies half way proves the contrary.
const MARKERS: [&str; 3] = ["Unable to mount root fs", "initramfs:", "Run /init as init process"];

/// Whether this console is of a kernel that got to its end.
pub fn is_booted(console: &str) -> bool {
    MARKERS.iter().any(|marker| console.contains(marker))
}
