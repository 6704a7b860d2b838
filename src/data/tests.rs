use super::*;
#[test]
#[ignore]
fn tmp_dump() {
    let sets = open(&Format::Shapes { train: 20000, test: 2000 }, 1).unwrap();
    for (name, set) in [("train", &sets.train), ("test", &sets.test)] {
        let mut all = vec![0; set.len() * 3072];
        let t = std::time::Instant::now();
        for i in 0..set.len() {
            set.read(i, &mut all[i * 3072..][..3072]).unwrap();
        }
        println!("{name} {:?} an image", t.elapsed() / set.len() as u32);
        std::fs::write(format!("/tmp/shapes-{name}.bin"), &all).unwrap();
    }
    for f in [
        Format::Idx { path: "/work/shared/data/fashion-mnist".into() },
        Format::Cifar { path: "/work/shared/data/cifar-10".into() },
    ] {
        let t = std::time::Instant::now();
        let s = open(&f, 0).unwrap();
        println!(
            "{f:?} {:?} {} {} {:?} {}",
            t.elapsed(),
            s.train.len(),
            s.test.len(),
            class_counts(&*s.train),
            fingerprint(&*s.test)
        );
        let t = std::time::Instant::now();
        println!("{:?} {:?}", augment::Statistics::of(&*s.train).unwrap(), t.elapsed());
        let a = augment::Augmenter::new(
            &[
                crate::config::raw::Augment::RandomCrop { padding: 4 },
                crate::config::raw::Augment::HorizontalFlip {},
                crate::config::raw::Augment::Normalize {},
            ],
            &*s.train,
        )
        .unwrap();
        let n = s.train.shape().len();
        let (mut im, mut out) = (vec![0; n], vec![0.0; n]);
        s.train.read(5, &mut im).unwrap();
        let t = std::time::Instant::now();
        for i in 0..20000 {
            a.apply(&im, &mut out, 1, 2, i);
        }
        println!("apply {:?}", t.elapsed() / 20000);
    }
}
