//! Disks by device-mapper, on a real kernel: Debian's, in a guest under emulation, because the kernel of the machine that runs the tests
//! may have none. This program is that guest's `/init`, and says by its exit whether all held.

mod guest;
mod lab;
mod storm;

use std::time::Duration;

#[test]
fn disks_by_device_mapper_in_a_guest_with_debians_kernel() {
    // Half a minute is usual.
    get_through("guest::everything", Duration::from_secs(240));
}

/// Hundreds of deaths; of these `make check` has some.
#[test]
#[ignore = "minutes"]
fn many_deaths_in_a_guest_with_debians_kernel() {
    get_through("storm::many_deaths", Duration::from_secs(1800));
}

fn get_through(test: &str, time_max: Duration) {
    let Some(lab) = lab::find() else { return };
    let said = lab.run(test, time_max);
    println!("{said}");
    assert!(said.contains("test result: ok. 1 passed"), "the guest did not get through");
}
