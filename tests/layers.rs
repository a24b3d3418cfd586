//! The layers of docs/architecture.md, read from the `use` lines: dependencies point down only, and
//! `migrate` and `vmm` meet at `control` alone, so that the code that parses bytes from the network
//! never holds KVM or devices.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module may use, itself aside.
fn allowed() -> BTreeMap<&'static str, Vec<&'static str>> {
    let middle = vec!["wire", "memory", "switchover", "sys"];
    // What is said on the control socket is what the saved state describes.
    let control = [middle.clone(), vec!["state"]].concat();
    let upper = vec!["control", "transport", "state", "wire", "memory", "switchover", "sys"];
    BTreeMap::from([
        ("sys", vec![]),
        ("memory", vec!["sys"]),
        ("switchover", vec!["sys"]),
        ("wire", vec!["memory", "switchover", "sys"]),
        ("state", middle.clone()),
        ("transport", middle),
        ("control", control),
        ("migrate", upper.clone()),
        ("vmm", upper.clone()),
        ("cli", [upper, vec!["migrate", "vmm"]].concat()),
    ])
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The modules that `text` names as `crate::NAME` or within `use crate::{NAME…, NAME…}`.
fn uses(text: &str) -> Vec<String> {
    let code: String =
        text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => {
                names.push(rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned())
            }
            Some(list) => {
                let mut depth = 0;
                let mut name = String::new();
                for c in list.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                        c if depth == 0 && !c.is_whitespace() => name.push(c),
                        _ => {}
                    }
                }
                names.push(name);
            }
        }
    }
    names
        .into_iter()
        .map(|n| n.split(':').next().unwrap_or_default().to_owned())
        .filter(|n| !n.is_empty())
        .collect()
}

#[test]
fn dependencies_point_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (module, allowed) in allowed() {
        let mut files = Vec::new();
        rust_files(&root.join(module), &mut files);
        for file in files {
            for name in uses(&fs::read_to_string(&file).unwrap()) {
                checked += 1;
                if name != module && !allowed.contains(&name.as_str()) {
                    wrong.push(format!("{} uses {name}", file.strip_prefix(&root).unwrap().display()));
                }
            }
        }
    }
    assert!(checked > 100, "only {checked} uses were found: the test reads nothing");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_reader_of_use_lines_sees_through_their_forms() {
    let text = "use crate::vmm::x;\nuse crate::{migrate, wire::{a, b}, state};\n// crate::sys\nlet y = crate::memory::z();";
    assert_eq!(uses(text), ["vmm", "migrate", "wire", "state", "memory"]);
}

/// Where unsafe code may be.
const UNSAFE_PLACES: [&str; 2] = ["src/sys/", "src/vmm/memory.rs"];

/// Lines of `text` with the keyword `unsafe`, comments and strings aside: their number, from 1, and
/// whether a `// SAFETY:` comment (or, for what is declared, a `# Safety` section) is right above.
fn unsafe_lines(text: &str) -> Vec<(usize, bool)> {
    let lines: Vec<&str> = text.lines().collect();
    let is_keyword = |line: &&str| {
        let code = line.split("//").next().unwrap_or_default();
        let unquoted: String = code.split('"').step_by(2).collect();
        unquoted.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe")
    };
    let explained = |at: usize| {
        // The statement or item that the keyword belongs to may have begun up to two lines before;
        // the comment above it may be of any length.
        let mut above = at;
        for _ in 0..=2 {
            let comment: Vec<&str> = lines[..above]
                .iter()
                .rev()
                .map(|l| l.trim_start())
                .take_while(|l| l.starts_with("//") || l.starts_with("#["))
                .collect();
            if comment.iter().any(|l| l.starts_with("// SAFETY:") || l.starts_with("/// # Safety")) {
                return true;
            }
            above = above.saturating_sub(1);
        }
        false
    };
    (0..lines.len()).filter(|n| is_keyword(&lines[*n])).map(|n| (n + 1, explained(n))).collect()
}

#[test]
fn unsafe_code_is_in_its_places_and_every_piece_says_why_it_is_sound() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("build.rs")];
    rust_files(&root.join("src"), &mut files);
    rust_files(&root.join("tests"), &mut files);
    let (mut wrong, mut found) = (Vec::new(), 0);
    for file in files {
        let path = file.strip_prefix(root).unwrap().display().to_string();
        for (line, explained) in unsafe_lines(&fs::read_to_string(&file).unwrap()) {
            found += 1;
            if !UNSAFE_PLACES.iter().any(|place| path.starts_with(place)) {
                wrong.push(format!("{path}:{line}: unsafe code belongs in {UNSAFE_PLACES:?}"));
            } else if !explained {
                wrong.push(format!("{path}:{line}: no // SAFETY: comment above it"));
            }
        }
    }
    assert!(found > 10, "only {found} unsafe lines were found: the test reads nothing");
    assert!(wrong.is_empty(), "{wrong:#?}");
    let lib = fs::read_to_string(root.join("src/lib.rs")).unwrap();
    assert!(lib.contains("#![deny(unsafe_code)]"), "src/lib.rs must deny unsafe code");
}

#[test]
fn the_reader_of_unsafe_code_sees_what_is_explained() {
    let good = "// SAFETY: one,\n// two.\nlet a =\n    unsafe { f() };\nlet b = \"unsafe\"; // unsafe\n";
    assert_eq!(unsafe_lines(good), [(4, true)]);
    let bad =
        "// SAFETY: for g.\nlet c = 1;\nlet d = 2;\nlet e = 3;\nunsafe { g() };\n#![deny(unsafe_code)]\n";
    assert_eq!(unsafe_lines(bad), [(5, false)]);
}
