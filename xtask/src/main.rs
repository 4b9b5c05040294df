//! Repository chores: images and kernels, checks of the tree, the bare floor of the benchmarks. Each subcommand is one file.

mod artifact;
mod bare_vmm;
mod compat;
mod images;
mod initramfs;
mod kernel;
mod rootfs;
mod run;
mod sqlx;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "Chores of the Wrenn repository")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Make (or take from the cache) guest kernel, initramfs, envd and the minimal rootfs, and put them into a directory.
    Images(images::Arguments),
    /// Compile (or take from the cache) the guest kernel of images/kernel, which `images` takes from there.
    Kernel(kernel::own::Arguments),
    /// Make (or take from the cache) what tests boot that need another kernel than this machine's.
    Lab(kernel::lab::Arguments),
    /// Make an image of a directory, as `scripts/rootfs-from-container.sh` does with what a container holds.
    ImageFromTree(images::FromTree),
    /// Check the tree: dependency arrows, docs, names.
    Tidy(tidy::Arguments),
    /// Write (or check) the `.sqlx` data that lets `store` compile without a database.
    Sqlx(sqlx::Arguments),
    /// Write docs/compat/wrenn.md.
    Compat(compat::Arguments),
    /// The floor of the benchmarks: one microVM driven by hand, with nothing of Wrenn's driver.
    BareVmm(bare_vmm::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().chore {
        Chore::Images(arguments) => images::run(&arguments),
        Chore::Kernel(arguments) => kernel::own::run(&arguments),
        Chore::Lab(arguments) => kernel::lab::run(&arguments),
        Chore::ImageFromTree(arguments) => images::from_tree(&arguments),
        Chore::Tidy(arguments) => tidy::run(&arguments),
        Chore::Sqlx(arguments) => sqlx::run(&arguments),
        Chore::Compat(arguments) => compat::run(&arguments),
        Chore::BareVmm(arguments) => bare_vmm::run(&arguments),
    }
}
