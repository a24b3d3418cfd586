//! What the documentation shows is what the programs take and give.

use std::fs;
use std::path::Path;

use vmferry::control::mover::{MoverProgress, MoverRequest, MoverSettings};
use vmferry::control::{Answer, Call, Event, Outcome, Request, Status};
use vmferry::switchover::Ownership;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The JSON lines behind `mark` in docs/control.md.
fn lines(text: &str, mark: char) -> Vec<&str> {
    let start = format!("{mark} `");
    text.lines()
        .flat_map(|line| line.split(&start).skip(1))
        .map(|rest| rest.split('`').next().unwrap())
        .collect()
}

/// The commands of `T`, from what serde says when it meets another.
fn commands<T: serde::de::DeserializeOwned>() -> Vec<String> {
    let error = serde_json::from_str::<Call<T>>(r#"{"id":1,"cmd":"?"}"#).map(|_| ()).unwrap_err().to_string();
    let listed = error.split("expected one of").nth(1).unwrap();
    listed.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_request_of_the_control_protocol_is_shown_and_right() {
    let text = read("docs/control.md");
    let requests = lines(&text, '→');
    for request in &requests {
        let vmrun = serde_json::from_str::<Call<Request>>(request);
        let vmsend = serde_json::from_str::<Call<MoverRequest>>(request);
        assert!(vmrun.is_ok() || vmsend.is_ok(), "{request}: {:?} {:?}", vmrun.err(), vmsend.err());
    }
    let all = [commands::<Request>(), commands::<MoverRequest>()].concat();
    assert!(all.len() > 20, "{all:?}");
    for command in all {
        let shown = format!("\"cmd\":\"{command}\"");
        assert!(requests.iter().any(|r| r.contains(&shown)), "docs/control.md lacks {command}");
    }
}

#[test]
fn answers_and_events_of_the_control_protocol_are_right() {
    let text = read("docs/control.md");
    let (mut seen, mut typed) = (0, 0);
    for line in lines(&text, '←') {
        seen += 1;
        if line.contains("\"event\":") {
            serde_json::from_str::<Event>(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            continue;
        }
        let answer: Answer = serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        let Outcome::Ok(value) = answer.outcome else { continue };
        let json = || value.clone();
        if value.get("run_state").is_some() {
            serde_json::from_value::<Status>(json()).unwrap();
        } else if value.get("phase").is_some() {
            serde_json::from_value::<MoverProgress>(json()).unwrap();
        } else if value.get("downtime_ms").is_some() {
            serde_json::from_value::<MoverSettings>(json()).unwrap();
        } else if let Some(ownership) = value.get("ownership") {
            serde_json::from_value::<Ownership>(ownership.clone()).unwrap();
        } else {
            continue;
        }
        typed += 1;
    }
    assert!(seen > 15 && typed >= 4, "{seen} lines, {typed} of a known type");
}

/// Links between the documents lead somewhere, and so do the source files that they name.
#[test]
fn what_the_documents_point_to_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let links = text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap());
        for link in links.filter(|l| !l.is_empty() && !l.contains("://")) {
            assert!(path.parent().unwrap().join(link).exists(), "{}: {link}", path.display());
        }
        let named = text.split(|c: char| c.is_whitespace() || "`(),;:|".contains(c));
        for file in
            named.filter(|w| w.starts_with("src/") || w.starts_with("tests/") || w.starts_with("scripts/"))
        {
            let file = file.trim_end_matches('.');
            assert!(root.join(file).exists(), "{}: {file}", path.display());
        }
    }
}
