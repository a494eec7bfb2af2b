use super::*;

const ORDERS: [ByteOrder; 2] = [ByteOrder::Little, ByteOrder::Big];

fn again(bytes: &[u8]) -> Exif<'_> {
    let exif = Exif::parse(bytes).unwrap();
    assert!(exif.lost().is_empty(), "{:?}", exif.lost());
    exif
}

/// A block as others write it: fields of (tag, kind, count, value or offset) in a main directory at 8, then `rest`.
fn block(fields: &[(u16, u16, u32, u32)], rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"MM\0*\0\0\0\x08".to_vec();
    bytes.extend((fields.len() as u16).to_be_bytes());
    for (tag, kind, count, value) in fields {
        bytes.extend(tag.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(count.to_be_bytes());
        bytes.extend(value.to_be_bytes());
    }
    bytes.extend([0; 4]);
    bytes.extend(rest);
    bytes
}

/// Where `rest` begins in a [`block`] of so many fields.
fn rest(fields: u32) -> u32 {
    8 + 2 + 12 * fields + 4
}

#[test]
fn a_comment_set_in_a_new_block_is_read_back_in_either_byte_order() {
    for order in ORDERS {
        let mut exif = Exif::new(order);
        exif.set_text(Directory::Main, MAKE, "Camera");
        exif.set_comment("first");
        exif.set_comment("Ürsprünglich 日本");
        exif.set_history("done");
        let bytes = exif.to_bytes().unwrap();
        let exif = again(&bytes);
        assert_eq!(exif.comment(), Comment::Text("Ürsprünglich 日本".into()));
        assert_eq!(exif.history().unwrap(), "done");
        assert_eq!(exif.text(Directory::Main, MAKE).unwrap(), "Camera");
    }
}

#[test]
fn every_directory_and_value_is_written_and_the_maker_note_keeps_its_offset() {
    for order in ORDERS {
        let mut exif = Exif::new(order);
        exif.set_text(Directory::Main, MAKE, "Camera");
        let note: Vec<u8> = (0..=255).collect();
        exif.set(Directory::Exif, MAKER_NOTE, UNDEFINED, note.clone());
        exif.set_text(Directory::Gps, 29, "2024:01:02");
        exif.set_text(Directory::Interop, 1, "R98");
        let first = exif.to_bytes().unwrap();
        let mut exif = again(&first);
        let before = exif.note().unwrap();
        exif.set_comment("added, and longer than what was there before");
        exif.set_text(
            Directory::Main,
            MODEL,
            "added too, so that the first directory must move",
        );
        let second = exif.to_bytes().unwrap();
        let exif = again(&second);
        assert_eq!(exif.note().unwrap(), before);
        assert_eq!(&second[before], note);
        assert_eq!(exif.text(Directory::Gps, 29).unwrap(), "2024:01:02");
        assert_eq!(exif.text(Directory::Interop, 1).unwrap(), "R98");
        assert_eq!(exif.text(Directory::Main, MAKE).unwrap(), "Camera");
    }
}

#[test]
fn fitting_resets_the_orientation_and_the_stated_sizes_and_adds_none() {
    let mut exif = Exif::new(ByteOrder::Little);
    exif.set(Directory::Main, ORIENTATION, SHORT, vec![6, 0]);
    exif.set(Directory::Exif, PIXEL_WIDTH, SHORT, vec![40, 0]);
    exif.fit(80, 60);
    let bytes = exif.to_bytes().unwrap();
    let exif = again(&bytes);
    let value = |directory, tag| exif.field(directory, tag).map(|f| f.value.to_vec());
    assert_eq!(value(Directory::Main, ORIENTATION).unwrap(), [1, 0]);
    assert_eq!(value(Directory::Exif, PIXEL_WIDTH).unwrap(), [80, 0, 0, 0]);
    assert_eq!(value(Directory::Exif, PIXEL_HEIGHT), None);
}

#[test]
fn of_two_fields_of_one_tag_the_first_is_kept_so_that_no_old_orientation_stays() {
    let six = 6 << 16;
    let bytes = block(
        &[(ORIENTATION, SHORT, 1, six), (ORIENTATION, SHORT, 1, six)],
        &[],
    );
    let mut exif = again(&bytes);
    exif.fit(1, 1);
    let bytes = exif.to_bytes().unwrap();
    let fields = again(&bytes).fields(Directory::Main).to_vec();
    assert_eq!(fields.len(), 1);
    assert_eq!(*fields[0].value, [0, 1]);
}

#[test]
fn directories_that_overlap_the_header_each_other_or_themselves_are_refused() {
    for main in [0u32, 4, 7, u32::MAX, 1 << 31] {
        let mut bytes = block(&[], &[0; 64]);
        bytes[4..8].copy_from_slice(&main.to_be_bytes());
        assert!(Exif::parse(&bytes).is_none(), "main directory at {main}");
    }
    // The EXIF directory on the header, on the main directory, past the end.
    for at in [0, 4, 8, 10, 20, 1000, u32::MAX] {
        let bytes = block(&[(MAKE, ASCII, 1, 0), (0x8769, LONG, 1, at)], &[0; 64]);
        let exif = Exif::parse(&bytes).unwrap();
        assert!(
            exif.lost()[0].contains("camera settings"),
            "{at}: {:?}",
            exif.lost()
        );
        assert!(exif.field(Directory::Main, MAKE).is_some());
    }
    // Two names for one directory.
    let at = rest(2);
    let bytes = block(&[(0x8769, LONG, 1, at), (0x8825, LONG, 1, at)], &[0; 64]);
    assert_eq!(Exif::parse(&bytes).unwrap().lost().len(), 1);
}

#[test]
fn values_that_overlap_directories_or_each_other_are_left_out_by_name() {
    let at = rest(3);
    for (offset, kept) in [
        (0, 2),
        (8, 2),
        (20, 2),
        (at, 2),
        (at + 99, 2),
        (at + 100, 3),
    ] {
        let fields = [
            (0x010E, ASCII, 100, at),
            (MAKE, ASCII, 100, offset),
            (MODEL, ASCII, 2, 0x4100_0000),
        ];
        let bytes = block(&fields, &[65; 200]);
        let exif = Exif::parse(&bytes).unwrap();
        assert_eq!(
            exif.fields(Directory::Main).len(),
            kept,
            "value at {offset}"
        );
        let named = exif.lost().iter().any(|l| l.contains("0x010f"));
        assert_eq!(named, kept == 2, "{:?}", exif.lost());
    }
}

#[test]
fn short_values_may_be_shared_and_long_ones_belong_to_the_first_of_their_fields() {
    for (length, kept) in [(20, 3), (MAX_SHARED as u32, 3), (MAX_SHARED as u32 + 1, 1)] {
        let at = rest(3);
        // The third overlaps in part.
        let fields = [0, 1, 2].map(|i| (0x9C00 + i, ASCII, length, at + u32::from(i / 2) * 4));
        let bytes = block(&fields, &[65; 200]);
        let exif = Exif::parse(&bytes).unwrap();
        assert_eq!(exif.fields(Directory::Main).len(), kept);
        assert!(exif.to_bytes().unwrap().len() <= bytes.len());
    }
}

#[test]
fn all_values_together_are_not_longer_than_the_block() {
    let at = rest(500);
    let fields: Vec<_> = (0..500)
        .map(|i| (0x9C00 + i, ASCII, MAX_SHARED as u32, at + u32::from(i % 2)))
        .collect();
    let bytes = block(&fields, &[65; 100]);
    let exif = Exif::parse(&bytes).unwrap();
    let values = exif.fields(Directory::Main).iter().map(|f| f.value.len());
    assert!(values.sum::<usize>() <= bytes.len());
    assert!(exif.lost()[0].contains("damaged"), "{:?}", exif.lost());
}

#[test]
fn bytes_of_no_field_stay_beside_a_maker_note_and_the_thumbnail_goes() {
    // EXIF directory with a note, then loose bytes, then the thumbnail's directory and its bytes.
    let exif_at = rest(1);
    let note_at = exif_at + 2 + 12 + 4;
    let loose_at = note_at + 100;
    let thumbnail_at = loose_at + 10;
    let data_at = thumbnail_at + 2 + 24 + 4;
    let entry = |tag: u16, kind: u16, count: u32, value: u32| {
        let head = [tag.to_be_bytes(), kind.to_be_bytes()].concat();
        [&head[..], &count.to_be_bytes(), &value.to_be_bytes()].concat()
    };
    let mut bytes = block(&[(0x8769, LONG, 1, exif_at)], &[]);
    let link = bytes.len() - 4;
    bytes[link..].copy_from_slice(&thumbnail_at.to_be_bytes());
    bytes.extend(
        [
            &[0, 1][..],
            &entry(MAKER_NOTE, UNDEFINED, 100, note_at),
            &[0; 4],
        ]
        .concat(),
    );
    bytes.extend([7; 100]);
    bytes.extend([8; 10]);
    bytes.extend([0, 2]);
    bytes.extend(entry(0x0201, LONG, 1, data_at));
    bytes.extend(entry(0x0202, LONG, 1, 300));
    bytes.extend([0; 4]);
    bytes.extend([9; 300]);
    let mut exif = again(&bytes);
    exif.set_comment("a comment that goes where the thumbnail was");
    let written = exif.to_bytes().unwrap();
    assert!(written.len() < bytes.len());
    let at = |at: u32, n: usize| &written[at as usize..][..n];
    assert_eq!(
        (at(note_at, 100), at(loose_at, 10)),
        (&[7; 100][..], &[8; 10][..])
    );
    assert!(!written.contains(&9));
    assert!(matches!(again(&written).comment(), Comment::Text(_)));
}

#[test]
fn a_block_of_any_bytes_never_grows_by_more_than_its_padding() {
    let mut state = 7u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    };
    for round in 0..3000 {
        let count = 1 + random() % 12;
        let fields: Vec<_> = (0..count)
            .map(|i| {
                let tag =
                    [0x8769, 0x8825, 0x927C, 0x010F, 0x0112, 0x0201, 0x9286][random() as usize % 7];
                let kind = random() % 15;
                let value = random() % 400;
                (
                    tag + (i % 2) as u16 * 256,
                    kind as u16,
                    random() % 60,
                    value,
                )
            })
            .collect();
        let rest: Vec<u8> = (0..random() % 300).map(|_| random() as u8 % 16).collect();
        let bytes = block(&fields, &rest);
        let Some(exif) = Exif::parse(&bytes) else {
            continue;
        };
        let written = exif.to_bytes().unwrap();
        // A note and what is around it keep their offsets; everything else can lie behind them.
        assert!(written.len() <= 2 * bytes.len() + 16, "round {round}");
        let second = Exif::parse(&written).unwrap();
        for directory in Directory::ALL {
            let values = |exif: &Exif| -> Vec<(u16, u16, Vec<u8>)> {
                let fields = exif.fields(directory).iter();
                fields.map(|f| (f.tag, f.kind, f.value.to_vec())).collect()
            };
            assert_eq!(values(&exif), values(&second), "round {round}");
        }
    }
}

#[test]
fn comments_of_every_encoding_are_told_from_padding_and_from_a_cameras_bytes() {
    let text = |t: &str| Comment::Text(t.into());
    for (value, want) in [
        (&b"ASCII\0\0\0holiday\0"[..], text("holiday")),
        (b"UNICODE\0\0h\0i", text("hi")),
        (b"UNICODE\0h\0i\0", text("hi")),
        (b"\0\0\0\0\0\0\0\0plain \0", text("plain")),
        (b"no code at all", text("no code at all")),
        (b"ASCII\0\0\0        ", Comment::Empty),
        (b"\0\0\0\0\0\0\0\0\0\0\0\0", Comment::Empty),
        (b"JIS\0\0\0\0\0  ", Comment::Empty),
        (b"JIS\0\0\0\0\0\x1b$B", Comment::Opaque),
        (b"\0\0\0\0\0\0\0\0\xff\xfe\x01", Comment::Opaque),
    ] {
        let mut exif = Exif::new(ByteOrder::Little);
        exif.set(Directory::Exif, USER_COMMENT, UNDEFINED, value.to_vec());
        assert_eq!(exif.comment(), want, "{value:?}");
    }
    assert_eq!(Exif::new(ByteOrder::Big).comment(), Comment::Empty);
}
