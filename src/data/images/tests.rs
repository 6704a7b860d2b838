use super::*;
use crate::data::class_counts;
use crate::error::Kind;

/// Files of an eight-pixel PNG each, but for number 2, which ends early.
struct Files {
    classes: Vec<String>,
}

const DAMAGED: usize = 2;

fn picture(index: usize) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 4, 2);
    encoder.set_color(png::ColorType::Grayscale);
    let pixels: Vec<u8> = (0..8).map(|at| (index * 50 + at) as u8).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    file
}

impl EncodedImages for Files {
    fn len(&self) -> usize {
        4
    }
    fn classes(&self) -> &[String] {
        &self.classes
    }
    fn label(&self, index: usize) -> u32 {
        (index % 2) as u32
    }
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<()> {
        *bytes = picture(index);
        bytes.truncate(if index == DAMAGED { 50 } else { usize::MAX });
        Ok(())
    }
    fn name(&self, index: usize) -> String {
        format!("file {index}")
    }
}

fn images(shared: &DataShared, channels: usize, outputs: usize) -> Result<Images> {
    let source = Arc::new(Files { classes: vec!["a".into(), "b".into()] });
    Images::new(source, shared, Target { input: Shape::new(9, 9, channels), outputs })
}

#[test]
fn encoded_images_are_a_data_set() {
    let set = images(&DataShared::default(), 1, 2).unwrap();
    assert_eq!((set.len(), set.shape(), set.classes(), set.label(3)), (4, None, 2, 1));
    let mut image = Image::default();
    set.read(3, &mut image).unwrap();
    assert_eq!((image.shape(), image.bytes()), (Shape::new(2, 4, 1), &[150, 151, 152, 153, 154, 155, 156, 157][..]));

    assert_eq!(images(&DataShared::default(), 3, 5).unwrap().classes(), 5, "outputs without a class");
    assert_eq!(images(&DataShared::default(), 3, 1).unwrap().classes(), 2, "more than the model has: refused with it");
    let error = images(&DataShared::default(), 4, 2).err().unwrap();
    assert!(error.kind() == Kind::Usage && error.to_string().contains("model.input has 4 channels"), "{error}");
}

#[test]
fn a_damaged_image_ends_the_run_or_is_said_to_be_damaged() {
    let mut image = Image::default();
    let error = images(&DataShared::default(), 3, 2).unwrap().read(DAMAGED, &mut image).unwrap_err();
    let text = error.to_string();
    assert!(
        error.kind() == Kind::Data && text.starts_with("file 2: not a whole PNG: ") && text.contains("\"skip\""),
        "{text}"
    );

    let shared = DataShared { on_bad_image: OnBadImage::Skip, ..DataShared::default() };
    let set = images(&shared, 3, 2).unwrap();
    let Reading::Damaged(reason) = set.read(DAMAGED, &mut image).unwrap() else { panic!("it is damaged") };
    assert!(reason.to_string().starts_with("file 2: not a whole PNG: "), "{reason}");
    assert!(matches!(set.read(1, &mut image), Ok(Reading::Whole)));

    let shared = DataShared { max_image_bytes: picture(1).len() as u64, ..shared };
    assert!(matches!(images(&shared, 3, 2).unwrap().read(1, &mut image), Ok(Reading::Whole)), "just short enough");
    let shared = DataShared { max_image_bytes: 60, ..shared };
    let limited = images(&shared, 3, 2).unwrap();
    let Reading::Damaged(reason) = limited.read(1, &mut image).unwrap() else { panic!("too long") };
    assert!(reason.to_string().contains("more than the 60 bytes that data.max_image_bytes allows"), "{reason}");
    // What is packed is the whole file or nothing.
    let error = limited.read_encoded(1, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.starts_with("file 1: it has more than the 60 bytes"), "{error}");
}

/// Of two classes of ten images, a test set has its share of each, the training set the others.
#[test]
fn a_folder_without_a_test_part_is_split() {
    let folder = tempfile::tempdir().unwrap();
    for (index, class) in (0..20).map(|index| (index, ["a", "b"][index % 2])) {
        let class = folder.path().join(class);
        std::fs::create_dir_all(&class).unwrap();
        std::fs::write(class.join(format!("{index}.png")), picture(index)).unwrap();
    }
    let opened = |test: f64| {
        let section: ImageFolder = toml::from_str(&format!("path = {:?}\ntest = {test}", folder.path())).unwrap();
        open(&section, &DataShared::default(), Target { input: Shape::new(2, 4, 1), outputs: 2 }, 3).unwrap()
    };
    let Sets { train, test } = opened(0.2);
    assert_eq!((class_counts(&*train), class_counts(&*test)), (vec![8; 2], vec![2; 2]));
    let mut image = Image::default();
    let mut first_bytes = Vec::new();
    for (set, index) in [&train, &test].into_iter().flat_map(|set| (0..set.len()).map(move |index| (set, index))) {
        set.read(index, &mut image).unwrap();
        first_bytes.push(image.bytes()[0]);
    }
    let mut expected: Vec<u8> = (0..20usize).map(|index| (index * 50) as u8).collect();
    first_bytes.sort();
    expected.sort();
    assert_eq!(first_bytes, expected, "every image is in one of them");

    let Sets { train, test } = opened(0.01);
    assert_eq!((train.len(), test.len()), (20, 20), "no image falls to the test set, so both are all");
}
