//! A kernel's declaration in its source against the types that a launch hands over. The driver takes addresses of arguments
//! and asks nothing: a missing one, or one of another width, would be read from the wrong place.

use super::Source;

/// Asserts that the source declares `name` with these types, written as in C.
pub fn check(source: &Source, name: &str, types: &[String]) {
    let declared = declared(source.text, name)
        .unwrap_or_else(|| panic!("{}.cu declares no extern \"C\" __global__ void {name}(...)", source.name));
    assert_eq!(declared, types, "arguments of {name} in {}.cu (left) and of its launch (right)", source.name);
}

/// The types of a kernel's parameters.
fn declared(text: &str, name: &str) -> Option<Vec<String>> {
    let kernels = text.split("__global__").skip(1);
    let head =
        kernels.filter_map(|kernel| kernel.split('{').next()).find(|head| head.contains(&format!(" {name}(")))?;
    let (_, parameters) = head.split_once(&format!(" {name}("))?;
    let parameters = parameters.rsplit_once(')')?.0;
    Some(parameters.split(',').map(type_of).filter(|declared| !declared.is_empty()).collect())
}

/// `const T* __restrict__ x`: `const T*`
fn type_of(parameter: &str) -> String {
    let words: Vec<&str> = parameter.split_whitespace().filter(|word| *word != "__restrict__").collect();
    words[..words.len().saturating_sub(1)].join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source {
        name: "some",
        text: "#include \"common.cuh\"\n\
               __device__ void scale_all(float a) {}\n\
               extern \"C\" __global__ void __launch_bounds__(256) scale(const T* __restrict__ x,\n    T* y, u64 n) { scale_all(n); }\n\
               extern \"C\" __global__ void nothing() {}\n",
    };

    #[test]
    fn types_are_those_of_the_declaration() {
        check(&SOURCE, "scale", &["const T*", "T*", "u64"].map(str::to_owned));
        check(&SOURCE, "nothing", &[]);
        for (name, wrong) in
            [("scale", &["const T*", "T*", "u32"][..]), ("scale", &["const T*", "T*"]), ("scale_all", &["float"])]
        {
            let types: Vec<String> = wrong.iter().map(|name| (*name).to_owned()).collect();
            assert!(std::panic::catch_unwind(|| check(&SOURCE, name, &types)).is_err(), "{name} {wrong:?}");
        }
    }
}
