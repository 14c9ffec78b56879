//! Ratings as people write them, and what a run says of them.

use proptest::prelude::*;

use super::*;

fn bytes(text: &str) -> Option<u64> {
    text.parse::<Endurance>().ok().map(Endurance::bytes)
}

fn place(directory: &str, device: u64, weight: u32) -> Place {
    Place { directory: directory.to_owned(), device, weight }
}

const RATED: Endurance = Endurance(600_000_000_000_000);

#[test]
fn ratings_are_read_as_data_sheets_write_them() {
    assert_eq!(bytes("600TBW"), Some(600_000_000_000_000));
    assert_eq!(bytes("600TB"), Some(600_000_000_000_000));
    assert_eq!(bytes("1.2PBW"), Some(1_200_000_000_000_000));
    assert_eq!(bytes("0.5gb"), Some(500_000_000));
    assert_eq!(bytes("18446.744073709551615PB"), Some(u64::MAX));
}

#[test]
fn what_is_not_a_rating_is_refused() {
    for text in [
        "",
        "TBW",
        "600",
        "600W",
        "600TiB",
        "600MB",
        "-1TB",
        "+1TB",
        "1e3TB",
        "1,5TB",
        ".5TB",
        "5.TB",
        " 5TB",
        "5 TB",
        "0TB",
        "0.0PB",
        "5TBWW",
        "5TB ",
        "1.2.3TB",
        "0.0000000001GB",
        "18446.744073709551616PB",
        "99999999999999999999GB",
        "٣TB",
    ] {
        assert_eq!(bytes(text), None, "{text:?}");
    }
}

proptest! {
    #[test]
    fn a_rating_that_is_shown_is_read_again(bytes in 1..=u64::MAX) {
        prop_assert_eq!(Endurance(bytes).to_string().parse(), Ok(Endurance(bytes)));
    }

    #[test]
    fn no_text_is_read_as_anything_but_what_it_says(
        whole in "[0-9]{0,6}", fraction in "(\\.[0-9]{0,10})?", unit in "[ kMGTPgtp]?[iI]?[bB]?[wW]?"
    ) {
        let text = format!("{whole}{fraction}{unit}");
        let said = format!("{whole}{fraction}").parse::<f64>().ok();
        let size = |unit: &str| UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let unit = unit.strip_suffix(['w', 'W']).unwrap_or(&unit);
        match (bytes(&text), said, size(unit)) {
            (Some(read), Some(said), Some(&(_, digits))) => {
                let meant = said * 10_f64.powi(digits.cast_signed());
                prop_assert!((read as f64 - meant).abs() <= 1e-9 * meant, "{} is not {}", read, text);
            }
            (Some(_), ..) => prop_assert!(false, "{} was read", text),
            (None, Some(said), Some(&(_, digits))) => {
                let lacks_digits = whole.is_empty() || fraction == ".";
                let too_fine = fraction.len() > digits as usize + 1;
                let too_large = said * 10_f64.powi(digits.cast_signed()) >= u64::MAX as f64;
                prop_assert!(said == 0.0 || lacks_digits || too_fine || too_large, "{} was refused", text);
            }
            (None, ..) => {}
        }
    }

    #[test]
    fn the_busiest_drive_takes_no_less_than_its_part_and_no_more_than_everything(
        volumes in prop::collection::vec((0u64..4, 1u32..100), 1..8)
    ) {
        let places: Vec<_> = volumes.iter().map(|&(device, weight)| place("d", device, weight)).collect();
        let rated = Rated::busiest(RATED, &places).unwrap();
        let devices = volumes.iter().map(|&(device, _)| device).collect::<std::collections::BTreeSet<_>>();
        prop_assert!(rated.share <= 1.0 && rated.share * devices.len() as f64 > 1.0 - 1e-9);
        prop_assert_eq!(rated.directory.is_some(), devices.len() > 1);
    }

    #[test]
    fn what_is_used_by_the_day_it_is_worn_out_is_everything(
        rated in 1_000_000_000u64..1 << 60, step in 1u64..1 << 50, seconds in 0.01f64..1e5, share in 0.01f64..=1.0
    ) {
        let drive = Rated { endurance: Endurance(rated), directory: None, share };
        let wear = drive.wear(step, step, Duration::from_secs_f64(seconds));
        let days = wear.days_to_wear_out.unwrap();
        let used = wear.life_used_fraction * days * DAY_SECONDS / seconds;
        prop_assert!((used - 1.0).abs() < 1e-6, "{}", used);
        prop_assert_eq!(drive.warning(wear).is_some(), days < MONTH_DAYS);
    }
}

#[test]
fn directories_on_one_file_system_wear_one_drive() {
    let places = [place("a", 1, 2), place("b", 2, 3), place("c", 1, 3)];
    let rated = Rated::busiest(RATED, &places).unwrap();
    assert_eq!((rated.directory.as_deref(), rated.share), (Some("a"), 5.0 / 8.0));
    let rated = Rated::busiest(RATED, &places[1..2]).unwrap();
    assert_eq!((rated.directory, rated.share), (None, 1.0), "there is nothing to tell it from");
    assert_eq!(Rated::busiest(RATED, &[]), None);
}

#[test]
fn a_run_that_wrote_nothing_wears_nothing_out() {
    let rated = Rated::busiest(RATED, &[place("a", 1, 1)]).unwrap();
    for elapsed in [Duration::ZERO, Duration::from_secs(1)] {
        let wear = rated.wear(0, 0, elapsed);
        assert_eq!(wear, Wear { life_used_fraction: 0.0, days_to_wear_out: None });
        assert_eq!(rated.warning(wear), None);
    }
}

#[test]
fn a_drive_that_does_not_last_a_month_is_warned_of_by_its_directory() {
    let rated = Rated::busiest(RATED, &[place("/a", 1, 1), place("/b", 2, 3)]).unwrap();
    // 75 % of 80 TB a day is a tenth of the rating.
    let wear = rated.wear(1, 80_000_000_000_000, Duration::from_secs(86_400));
    let expected = "at 60.0 TB a day, the drive of /b, rated for 600TBW, is worn out in 10 days";
    assert_eq!(rated.warning(wear).as_deref(), Some(expected));
}

#[test]
fn a_drive_whose_rating_is_written_already_is_not_said_to_last() {
    let rated = Rated::busiest(RATED, &[place("/a", 1, 1)]).unwrap();
    let warning = |run_bytes| {
        let step_bytes = 600_000_000_000_000;
        rated.warning(rated.wear(run_bytes, step_bytes, Duration::from_secs(86_400)))
    };
    let less = warning(599_999_999_999_999).unwrap();
    assert!(less.ends_with("is worn out in 24 hours"), "{less}");
    let expected = "the drive, rated for 600TBW, is worn out already, at 600 TB a day";
    assert_eq!(warning(600_000_000_000_000).as_deref(), Some(expected));
}

#[test]
fn amounts_and_times_are_shown_as_people_say_them() {
    let shown = |bytes| Decimal(bytes).to_string();
    assert_eq!(
        [shown(0), shown(999), shown(1000), shown(12_345_678_901)],
        ["0 B", "999 B", "1.0 kB", "12.3 GB"]
    );
    assert_eq!(
        [shown(999_960), shown(123_456_000_000_000), shown(u64::MAX)],
        ["1.0 MB", "123 TB", "18447 PB"]
    );
    let hours = |hours| lifetime(hours / 24.0);
    assert_eq!([hours(0.0), hours(0.99), hours(1.01)], ["less than an hour", "less than an hour", "1 hour"]);
    assert_eq!([hours(1.51), lifetime(2.5), lifetime(29.6)], ["2 hours", "60 hours", "30 days"]);
    assert_eq!([lifetime(1000.0), lifetime(1e9)], ["2.7 years", "more than 100 years"]);
}
