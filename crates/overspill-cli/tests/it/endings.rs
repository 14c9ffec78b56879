//! Commands end: nobody waits for a pipe that cannot be told to stop, work that is done is not called a failure for want of
//! a place to tell it, and a name that is no text stops no report.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::command::{Ended, Place, SMALL, read_json};

/// A folder with the state of a run of three steps, a snapshot of it, and its model.
fn kept() -> Place {
    let place = Place::new();
    fs::create_dir(place.path("swap")).unwrap();
    place.trained(&["--swap-dir", "swap", "--keep", "--out", "model"]);
    assert_eq!(place.run(&["snapshot", "swap", "s"]).status, Some(0));
    place
}

#[test]
fn a_store_whose_data_is_a_pipe_is_refused_by_whoever_reads_it() {
    let place = kept();
    let data = "swap/overspill-store/data";
    fs::remove_file(place.path(data)).unwrap();
    place.pipe(data);
    for arguments in [&["verify", "swap"][..], &["export", "swap", "out"], &["restore", "swap", "s"]] {
        let ended = place.run_in_time(&mut place.command(arguments));
        ended.refused(&["overspill-store/data: neither a file nor a disk"]);
    }
    let resume = [&["train"], &SMALL[..], &["--swap-dir", "swap", "--resume"]].concat();
    place.run_in_time(&mut place.command(&resume)).refused(&["overspill-store/data"]);
    assert!(!place.path("out").exists());
}

#[test]
fn a_model_folder_with_a_pipe_in_it_is_refused() {
    let place = kept();
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    for name in names {
        let file = place.path("model").join(name);
        let aside = place.path("aside");
        fs::rename(&file, &aside).unwrap();
        place.pipe(&format!("model/{name}"));
        let run = ["train", "--model", "model", "--seq", "16", "--steps", "1"];
        let ended = place.run_in_time(&mut place.command(&run));
        ended.refused(&[&format!("model/{name}: not a regular file")]);
        fs::rename(&aside, &file).unwrap();
    }
    place.pipe("model/generation_config.json");
    let export = ["export", "swap", "out", "--tokenizer", "model"];
    let ended = place.run_in_time(&mut place.command(&export));
    ended.refused(&["model/generation_config.json: not a regular file"]);
    assert!(!place.names().iter().any(|name| name.contains("out")), "{:?}", place.names());
}

#[test]
fn a_run_that_waits_for_its_text_ends_when_it_is_told_to() {
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let place = Place::new();
        let path = place.pipe("text.txt");
        let run = [&["train"], &SMALL[..], &["--data", "text.txt"]].concat();
        let child = place.command(&run).spawn().unwrap();
        // This waits until the run has opened the pipe.
        let pipe = File::options().write(true).open(path).unwrap();
        let killed = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
        assert!(killed.unwrap().success());
        let ended = Ended::of(&child.wait_with_output().unwrap());
        assert_eq!(ended.status, Some(status), "{}", ended.stderr);
        assert_eq!(ended.stderr, "overspill: interrupted\n");
        drop(pipe);
    }
}

#[test]
fn text_from_standard_input_is_trained_on() {
    let place = Place::new();
    let text = place.file("text.txt", "What comes through a pipe is text like any other.\n".repeat(20));
    let run = [&["train"], &SMALL[..], &["--data", "/dev/stdin"]].concat();
    let mut cat = Command::new("cat").arg(text).stdout(Stdio::piped()).spawn().unwrap();
    let ended = place.run_in_time(place.command(&run).stdin(cat.stdout.take().unwrap()));
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert!(cat.wait().unwrap().success());
}

#[test]
fn work_that_is_done_is_said_to_be_done_when_its_numbers_cannot_be_written() {
    let place = kept();
    fs::create_dir(place.path("disk")).unwrap();
    let full = |arguments: &[&str], says: &[&str]| {
        let ended = place.run(&[arguments, &["--json", "/dev/full"]].concat());
        ended.refused(&[says, &["cannot write /dev/full", "No space left on device"]].concat());
    };
    full(&["export", "swap", "out", "--form", "state"], &["the export is done, into out"]);
    full(&["import", "out", "--swap-dir", "disk"], &["the import is done, into disk/overspill-store"]);
    full(&["snapshot", "swap", "t"], &["snapshot t of swap/overspill-store is made"]);
    full(&["snapshot", "swap", "t", "--delete"], &["snapshot t of swap/overspill-store is given up"]);
    assert_eq!(place.trained(&["--swap-dir", "disk", "--resume"])["first_step"], 4);
    let mut tables = place.command(&["export", "swap", "table"]);
    tables.stdout(File::options().write(true).open("/dev/full").unwrap());
    place.run_in_time(&mut tables).refused(&["the export is done, into table", "standard output"]);
}

#[test]
fn every_report_is_written_whatever_the_bytes_of_its_paths_are() {
    let place = kept();
    let odd = |name: &[u8]| OsStr::from_bytes(name).to_owned();
    let (swap, out, disk) = (odd(b"swap\xff"), odd(b"out\xff"), odd(b"disk\xff"));
    let folder = place.path("swap");
    fs::rename(&folder, folder.with_file_name(&swap)).unwrap();
    fs::create_dir(folder.with_file_name(&disk)).unwrap();
    let run = |arguments: &[&str], paths: &[&OsStr]| -> Value {
        let mut command =
            place.command(&[&arguments[..1], &["--json", "numbers.json"], &arguments[1..]].concat());
        let ended = place.run_in_time(command.args(paths));
        assert_eq!(ended.status, Some(0), "{arguments:?}: {}", ended.stderr);
        read_json(&place.path("numbers.json"))
    };
    let home = "swap\u{fffd}/overspill-store";
    assert_eq!(run(&["inspect"], &[&swap])["directories"][0], home);
    assert_eq!(run(&["verify"], &[&swap])["directory"], home);
    assert_eq!(run(&["snapshot"], &[&swap])["directory"], home);
    assert_eq!(run(&["snapshot"], &[&swap, OsStr::new("t")])["directory"], home);
    assert_eq!(run(&["restore", "--previous"], &[&swap])["directory"], home);
    assert!(run(&["gc"], &[&swap])["directories"][0]["path"].as_str().unwrap().ends_with(home));
    assert_eq!(run(&["export", "--form", "state"], &[&swap, &out])["out"], "out\u{fffd}");
    let imported = run(&["import"], &[&out, OsStr::new("--swap-dir"), &disk]);
    assert_eq!(imported["from"], "out\u{fffd}");
    assert_eq!(imported["store"], "disk\u{fffd}/overspill-store");
    assert_eq!(run(&["tune", "--seconds", "1", "--dir"], &[&disk])["directory"], "disk\u{fffd}");
}

#[test]
fn the_help_says_what_a_name_may_have_in_words() {
    let help = Place::new().run(&["snapshot", "--help"]).stdout;
    assert!(help.contains("letters, digits, dots and the signs - and _"), "{help}");
}
