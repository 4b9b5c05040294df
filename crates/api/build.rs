//! Compiles the `.proto` files of the contracts that were asked for, without protoc.

use std::path::{Path, PathBuf};

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed=proto");
    if std::env::var_os("CARGO_FEATURE_GUEST").is_some() {
        generate(&out, "guest", &["process/process.proto", "filesystem/filesystem.proto"]);
    }
    if std::env::var_os("CARGO_FEATURE_HOST").is_some() {
        generate(&out, "host", &["hostagent/v1/hostagent.proto"]);
    }
}

/// Generated code of one contract in `OUT_DIR/<name>/`, to be included by `src/<name>.rs`.
fn generate(out: &Path, name: &str, files: &[&str]) {
    let dir = out.join(name);
    std::fs::create_dir_all(&dir).expect("OUT_DIR can be written");
    let mut compiler = protox::Compiler::new(["proto"]).expect("the proto folder is there");
    compiler.include_imports(true).include_source_info(true).open_files(files).expect("the contracts compile");
    let set = dir.join("descriptors.bin");
    std::fs::write(&set, compiler.encode_file_descriptor_set()).expect("OUT_DIR can be written");
    connectrpc_build::Config::new()
        .files(files)
        .descriptor_set(&set)
        .out_dir(&dir)
        .include_file("_connectrpc.rs")
        .emit_rerun_directives(false)
        .compile()
        .expect("the generated code can be written");
}
