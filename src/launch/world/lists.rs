//! Slurm's short forms (slurm_hostlist in scontrol(1), SLURM_TASKS_PER_NODE in sbatch(1)): tasks a node, `2(x3),1`, and
//! host names, `node[001-004,7]-ib,login`.

use crate::error::{Error, Result};

/// More entries than any machine has nodes. A longer list is a mistake, and is not expanded.
const MOST: usize = 1 << 17;

/// `2(x3),1` is 2, 2, 2, 1. Errors (kind Usage) say what does not fit.
pub fn counts(list: &str) -> Result<Vec<usize>> {
    let mut counts = Vec::new();
    for item in list.split(',') {
        let (count, times) = match item.trim().split_once("(x") {
            Some((count, rest)) => (number(count)?, number(rest.strip_suffix(')').ok_or_else(|| malformed(item))?)?),
            None => (number(item.trim())?, 1),
        };
        room_for(counts.len(), times)?;
        counts.extend(std::iter::repeat_n(count, times));
    }
    Ok(counts)
}

/// `n[08-10]-ib,login` is n08-ib, n09-ib, n10-ib, login; of several brackets the last runs fastest. Errors (kind Usage) say
/// what does not fit.
pub fn hosts(list: &str) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    for item in outside_of_brackets(list)? {
        let mut names = vec![String::new()];
        let mut rest = item;
        while let Some((literal, after)) = rest.split_once('[') {
            let (ranges, after) = after.split_once(']').ok_or_else(|| malformed(item))?;
            names = append(&names, literal, &numbers(ranges)?)?;
            rest = after;
        }
        names.iter_mut().for_each(|name| name.push_str(rest));
        if names.iter().any(String::is_empty) {
            return Err(malformed(list));
        }
        room_for(hosts.len(), names.len())?;
        hosts.append(&mut names);
    }
    Ok(hosts)
}

/// Every name with the literal and each of the numbers behind it.
fn append(names: &[String], literal: &str, numbers: &[String]) -> Result<Vec<String>> {
    room_for(0, names.len().saturating_mul(numbers.len()))?;
    Ok(names.iter().flat_map(|name| numbers.iter().map(move |number| format!("{name}{literal}{number}"))).collect())
}

/// What stands in a bracket, `08-10,12`: numbers are as wide as the first of their range.
fn numbers(ranges: &str) -> Result<Vec<String>> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let width = first.len();
        let (first, last) = (number(first)?, number(last)?);
        let count = last.checked_sub(first).ok_or_else(|| malformed(range))?;
        room_for(numbers.len(), count.saturating_add(1))?;
        numbers.extend((first..=last).map(|number| format!("{number:0width$}")));
    }
    Ok(numbers)
}

/// The items between the commas that are in no bracket.
fn outside_of_brackets(list: &str) -> Result<Vec<&str>> {
    let (mut items, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, character) in list.char_indices() {
        match (character, inside) {
            ('[', false) | (']', true) => inside = !inside,
            ('[', true) | (']', false) => return Err(malformed(list)),
            (',', false) => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(&list[start..]);
    if inside { Err(malformed(list)) } else { Ok(items) }
}

fn number(text: &str) -> Result<usize> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| malformed(text))
}

fn room_for(present: usize, more: usize) -> Result<()> {
    if more > MOST - present {
        return Err(Error::usage(format!("the list has more than {MOST} entries; no job is as large")));
    }
    Ok(())
}

fn malformed(part: &str) -> Error {
    Error::usage(format!("`{part}` is not part of a list as Slurm writes them, such as `2(x3),1` or `node[001-004,7]`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_are_expanded_as_slurm_does() {
        assert_eq!(counts("2(x3),1").unwrap(), [2, 2, 2, 1]);
        assert_eq!(counts("4").unwrap(), [4]);
        for (list, names) in [
            ("login", &["login"][..]),
            ("node[001-003,7],login", &["node001", "node002", "node003", "node7", "login"]),
            ("n[8-10]", &["n8", "n9", "n10"]),
            ("n[08-10]", &["n08", "n09", "n10"]),
            ("r[1-2]n[01-02]-ib", &["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
            ("a-1.cluster,b[0]", &["a-1.cluster", "b0"]),
        ] {
            assert_eq!(hosts(list).unwrap(), names, "{list}");
        }
    }

    #[test]
    fn what_is_no_list_and_what_is_huge_is_refused() {
        for list in ["", "2(x", "2(3)", "x", "-1", "+2", "1,,2", "2(x3", "99999999999999999999"] {
            assert_eq!(counts(list).unwrap_err().kind(), crate::error::Kind::Usage, "{list}");
        }
        for list in ["", "a,", "n[1-", "n]", "n[[1]]", "n[2-1]", "n[a-b]", "n[]", "n[1-2-3]"] {
            assert_eq!(hosts(list).unwrap_err().kind(), crate::error::Kind::Usage, "{list}");
        }
        for huge in ["n[0-999999999]", "n[0-999][0-999]", "n[1-100000],m[1-100000]", "n[0-18446744073709551615]"] {
            assert!(hosts(huge).unwrap_err().to_string().contains("more than"), "{huge}");
        }
        assert!(counts("1(x18446744073709551615)").unwrap_err().to_string().contains("more than"));
    }

    proptest! {
        #[test]
        fn counts_come_back(runs in prop::collection::vec((0usize..200, 1usize..9), 1..20)) {
            let list: Vec<String> = runs.iter().map(|(count, times)| format!("{count}(x{times})")).collect();
            let expected: Vec<usize> = runs.iter().flat_map(|&(count, times)| vec![count; times]).collect();
            prop_assert_eq!(counts(&list.join(",")).unwrap(), expected);
        }

        #[test]
        fn hosts_come_back(groups in prop::collection::vec(("[a-z]{1,5}", 0usize..1200, 0usize..20, 1usize..6), 1..8)) {
            let list: Vec<String> = groups
                .iter()
                .map(|(name, first, more, width)| format!("{name}[{first:0width$}-{:0width$}]-x", first + more))
                .collect();
            let expected: Vec<String> = groups
                .iter()
                .flat_map(|(name, first, more, width)| {
                    (*first..=first + more).map(move |number| format!("{name}{number:0width$}-x"))
                })
                .collect();
            prop_assert_eq!(hosts(&list.join(",")).unwrap(), expected);
        }

        #[test]
        fn noise_is_an_error_or_a_list_and_never_a_panic(text in "[a-c0-3\\[\\](),x-]{0,40}") {
            let _ = (hosts(&text), counts(&text));
        }
    }
}
