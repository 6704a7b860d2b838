//! libcudnn for the emulator: the functions of cuDNN 9's backend API that convolutions need, as an interpreter of operation
//! graphs on host memory.
//!
//! It is made to find mistakes. Descriptors are numbers in a table, so one that was destroyed, not finalized, or of another
//! type is noticed; `rules` refuses what the documentation of the backend API does not allow, with a text in
//! `cudnnGetLastErrorString`. `engines` offers several engines for a graph, some of which are traps: they compute what
//! their numerical notes warn of. `compute` runs a graph with plain loops.
//!
//! What it does not show: which graphs a real cuDNN has engines for.

mod compute;
mod engines;
#[path = "../queue.rs"]
mod queue;
mod rules;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Mutex;

const SUCCESS: c_int = 0;
const NOT_INITIALIZED: c_int = 1001;
pub const BAD_PARAM: c_int = 2000;
pub const NOT_SUPPORTED: c_int = 3000;

/// A status and what `cudnnGetLastErrorString` says of it.
pub type Failure = (c_int, String);

pub fn bad<T>(text: impl Into<String>) -> Result<T, Failure> {
    Err((BAD_PARAM, text.into()))
}

/// A descriptor's handle, as the caller sees it.
pub type Id = usize;

#[derive(Clone, Debug)]
pub struct Descriptor {
    pub kind: c_int,
    pub finalized: bool,
    /// By name, as the caller set them.
    pub attributes: BTreeMap<c_int, Vec<u8>>,
    /// Of an engine, a configuration and a plan, which have no attribute for it.
    pub engine: Option<engines::Engine>,
}

impl Descriptor {
    pub fn has(&self, name: c_int) -> bool {
        self.attributes.contains_key(&name)
    }
    pub fn i64s(&self, name: c_int) -> Vec<i64> {
        let bytes = self.attributes.get(&name).map_or(&[][..], |bytes| bytes);
        bytes.chunks_exact(8).map(|bytes| i64::from_ne_bytes(bytes.try_into().unwrap())).collect()
    }
    /// Of one element.
    pub fn i64(&self, name: c_int) -> i64 {
        self.i64s(name)[0]
    }
    /// Of one element: an enumeration.
    pub fn i32(&self, name: c_int) -> c_int {
        c_int::from_ne_bytes(self.attributes[&name][..4].try_into().unwrap())
    }
    pub fn f32(&self, name: c_int, absent: f32) -> f32 {
        let bytes = self.attributes.get(&name);
        bytes.map_or(absent, |bytes| f32::from_ne_bytes(bytes[..4].try_into().unwrap()))
    }
    pub fn flag(&self, name: c_int) -> bool {
        self.attributes.get(&name).is_some_and(|bytes| bytes[0] != 0)
    }
    pub fn id(&self, name: c_int) -> Id {
        self.i64(name) as Id
    }
}

/// All descriptors that live. A handle is its number times 16, so that it looks like an address.
#[derive(Clone)]
pub struct Table {
    descriptors: BTreeMap<Id, Descriptor>,
    created: usize,
}

impl Table {
    pub fn get(&self, id: Id) -> Result<&Descriptor, Failure> {
        self.descriptors.get(&id).ok_or_else(|| (BAD_PARAM, format!("{id:#x} is no descriptor, or was destroyed")))
    }
    fn get_mut(&mut self, id: Id) -> Result<&mut Descriptor, Failure> {
        self.descriptors.get_mut(&id).ok_or_else(|| (BAD_PARAM, format!("{id:#x} is no descriptor, or was destroyed")))
    }
    /// One that may be used.
    pub fn finalized(&self, id: Id, kind: c_int) -> Result<&Descriptor, Failure> {
        let descriptor = self.get(id)?;
        if descriptor.kind != kind {
            return bad(format!("a descriptor of type {} where type {kind} is expected", descriptor.kind));
        }
        if !descriptor.finalized {
            return bad(format!("a descriptor of type {kind} is used before it was finalized"));
        }
        Ok(descriptor)
    }
    fn create(&mut self, kind: c_int) -> Id {
        self.created += 1;
        let descriptor = Descriptor { kind, finalized: false, attributes: BTreeMap::new(), engine: None };
        self.descriptors.insert(self.created * 16, descriptor);
        self.created * 16
    }
}

static TABLE: Mutex<Table> = Mutex::new(Table { descriptors: BTreeMap::new(), created: 0 });

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// The status for the caller; what failed is kept for `cudnnGetLastErrorString`.
fn status(call: &str, result: Result<(), Failure>) -> c_int {
    match result {
        Ok(()) => SUCCESS,
        Err((status, text)) => {
            LAST_ERROR.with(|last| *last.borrow_mut() = format!("{call}: {text}"));
            status
        }
    }
}

fn with_table(call: &str, work: impl FnOnce(&mut Table) -> Result<(), Failure>) -> c_int {
    let mut table = TABLE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    status(call, work(&mut table))
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetVersion() -> usize {
    91100
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetErrorString(status: c_int) -> *const c_char {
    let text = match status {
        SUCCESS => c"CUDNN_STATUS_SUCCESS",
        NOT_INITIALIZED => c"CUDNN_STATUS_NOT_INITIALIZED",
        BAD_PARAM => c"CUDNN_STATUS_BAD_PARAM",
        NOT_SUPPORTED => c"CUDNN_STATUS_NOT_SUPPORTED",
        _ => c"CUDNN_STATUS_INTERNAL_ERROR",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnGetLastErrorString(message: *mut c_char, room: usize) {
    LAST_ERROR.with(|last| {
        let last = std::mem::take(&mut *last.borrow_mut());
        let count = last.len().min(room.saturating_sub(1));
        unsafe {
            message.cast::<u8>().copy_from_nonoverlapping(last.as_ptr(), count);
            *message.add(count) = 0;
        }
    });
}

/// A handle is the address of the stream that was set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnCreate(handle: *mut *mut usize) -> c_int {
    unsafe { *handle = Box::into_raw(Box::new(0)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnDestroy(handle: *mut usize) -> c_int {
    unsafe { drop(Box::from_raw(handle)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetStream(handle: *mut usize, stream: usize) -> c_int {
    unsafe { *handle = stream };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendCreateDescriptor(kind: c_int, descriptor: *mut Id) -> c_int {
    with_table("cudnnBackendCreateDescriptor", |table| {
        if !rules::KINDS.contains(&kind) {
            return Err((NOT_SUPPORTED, format!("no descriptors of type {kind} in the emulator")));
        }
        unsafe { *descriptor = table.create(kind) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnBackendDestroyDescriptor(descriptor: Id) -> c_int {
    with_table("cudnnBackendDestroyDescriptor", |table| match table.descriptors.remove(&descriptor) {
        Some(_) => Ok(()),
        None => bad(format!("{descriptor:#x} is no descriptor, or was destroyed before")),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendSetAttribute(
    descriptor: Id,
    name: c_int,
    kind: c_int,
    count: i64,
    elements: *const u8,
) -> c_int {
    with_table("cudnnBackendSetAttribute", |table| {
        let of = table.get(descriptor)?;
        if of.finalized {
            return bad(format!("attribute {name} is set after the descriptor was finalized"));
        }
        let rule = rules::settable(of.kind, name)?;
        if kind != rule.kind || !(rule.least..=rule.most).contains(&count) || elements.is_null() {
            return bad(format!(
                "attribute {name}: {count} elements of type {kind}; type {}, {} to {} elements are expected",
                rule.kind, rule.least, rule.most
            ));
        }
        let bytes = count as usize * rules::bytes_of(kind);
        let value = unsafe { std::slice::from_raw_parts(elements, bytes) }.to_vec();
        table.get_mut(descriptor)?.attributes.insert(name, value);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnBackendFinalize(descriptor: Id) -> c_int {
    with_table("cudnnBackendFinalize", |table| {
        let of = table.get(descriptor)?;
        if of.finalized {
            return bad("the descriptor was finalized before");
        }
        rules::check(table, of)?;
        let engine = engines::of_plan(table, of)?;
        let of = table.get_mut(descriptor)?;
        of.engine = engine;
        of.finalized = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnBackendGetAttribute(
    descriptor: Id,
    name: c_int,
    kind: c_int,
    requested: i64,
    count: *mut i64,
    elements: *mut u8,
) -> c_int {
    with_table("cudnnBackendGetAttribute", |table| {
        let of = table.get(descriptor)?.clone();
        if !of.finalized {
            return bad(format!("attribute {name} is asked for before the descriptor was finalized"));
        }
        let mut answer = engines::answer(table, &of, name, kind)?;
        if rules::is_scalar(of.kind, name) && requested != 1 {
            return bad(format!("attribute {name} has one element, {requested} are asked for"));
        }
        if (of.kind, name) == (rules::ENGINE_CONFIG, 302) {
            // Real cuDNN counts knobs only as far as there is room for them.
            answer.truncate(requested as usize);
        }
        if !count.is_null() {
            unsafe { *count = answer.len() as i64 };
        }
        let wanted = if elements.is_null() { 0 } else { answer.len().min(requested as usize) };
        for (i, element) in answer.into_iter().take(wanted).enumerate() {
            match element {
                engines::Element::Enumeration(value) => unsafe { *elements.cast::<c_int>().add(i) = value },
                engines::Element::Integer(value) => unsafe { *elements.cast::<i64>().add(i) = value },
                // The caller made a descriptor, which is filled.
                engines::Element::Descriptor(value) => {
                    let id = unsafe { *elements.cast::<Id>().add(i) };
                    let to = table.get_mut(id)?;
                    if to.kind != value.kind {
                        return bad(format!("a descriptor of type {} for a value of type {}", to.kind, value.kind));
                    }
                    *to = value;
                }
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnBackendExecute(handle: *mut c_void, plan: Id, pack: Id) -> c_int {
    with_table("cudnnBackendExecute", |table| {
        if handle.is_null() {
            return bad("the handle is null");
        }
        compute::execute(table, unsafe { *handle.cast::<usize>() }, plan, pack)
    })
}
