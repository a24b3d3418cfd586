//! Builds the trial guests with the C compiler (`CC`, default `gcc`): `heartbeat.elf`, which vmrun
//! embeds, and `other.elf` and `drivers.elf`, which tests boot.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    for input in ["guest", "tests/guests", "build.rs"] {
        println!("cargo::rerun-if-changed={input}");
    }
    println!("cargo::rerun-if-env-changed=CC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    // Ring 3 without an FPU context; the guest has no C library to call memset in.
    let c_flags = [
        "-O2",
        "-Wall",
        "-Wextra",
        "-ffreestanding",
        "-fno-pic",
        "-fno-stack-protector",
        "-fno-tree-loop-distribute-patterns",
        "-fno-asynchronous-unwind-tables",
        "-mno-red-zone",
        "-mgeneral-regs-only",
    ];
    let script = ["-Wl,-T,guest/guest.ld", "-Wl,--defsym=GUEST_BASE=0x100000"];
    let sources = ["guest/heartbeat.S", "guest/heartbeat.c"];
    compile(&out.join("heartbeat.elf"), &[&c_flags[..], &script[..], &sources[..]].concat());
    compile(&out.join("other.elf"), &["-Wl,-Ttext-segment=0x400000", "tests/guests/other.S"]);
    let sources = ["-Iguest", "guest/heartbeat.S", "tests/guests/drivers.c"];
    compile(&out.join("drivers.elf"), &[&c_flags[..], &script[..], &sources[..]].concat());
    // For integration tests, which do not have OUT_DIR.
    println!("cargo::rustc-env=DRIVERS_ELF={}", out.join("drivers.elf").display());
    println!("cargo::rustc-env=OTHER_ELF={}", out.join("other.elf").display());
}

/// Compiles and links one guest; stops the build with the compiler's own words when that fails.
fn compile(output: &Path, arguments: &[&str]) {
    let default = if cfg!(target_arch = "x86_64") { "gcc" } else { "x86_64-linux-gnu-gcc" };
    let cc = env::var("CC").ok().filter(|cc| !cc.trim().is_empty());
    let cc = cc.unwrap_or_else(|| default.to_owned());
    let mut words = cc.split_whitespace(); // as in CC="ccache gcc"
    let result = Command::new(words.next().expect("CC is not empty"))
        .args(words)
        // No build id: the PVH note has to be the only one.
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack"])
        .args(arguments)
        .arg("-o")
        .arg(output)
        .output();
    match result {
        Err(error) => {
            eprintln!(
                "The trial guest is built from source and needs a C compiler for x86_64: \
                 cannot run `{cc}`: {error}.\n\
                 Install gcc (Debian: apt-get install gcc) or set CC."
            );
            std::process::exit(1);
        }
        Ok(run) if !run.status.success() => {
            eprintln!("`{cc}` could not build {}:", output.display());
            eprintln!("{}", String::from_utf8_lossy(&run.stderr));
            std::process::exit(1);
        }
        Ok(_) => {}
    }
}
