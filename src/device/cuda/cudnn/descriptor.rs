//! Descriptors, of which all of the backend API consists: objects with attributes, usable once they are finalized.

use crate::error::{Error, Result};
use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t, cudnnConvolutionMode_t, cudnnDataType_t,
    cudnnHandle_t, cudnnNanPropagation_t, cudnnPointwiseMode_t, cudnnStatus_t,
};
use std::ffi::{CStr, c_char};
use std::ptr;

/// Owned: destroyed with its last use.
#[derive(Debug)]
pub struct Descriptor(cudnnBackendDescriptor_t);

// SAFETY: cuDNN's descriptors belong to no thread.
unsafe impl Send for Descriptor {}
// SAFETY: one that is shared is finalized, and only read.
unsafe impl Sync for Descriptor {}

/// What an attribute's elements are.
///
/// # Safety
/// `TYPE` names the type in C that has this type's bytes.
pub unsafe trait Attribute: Copy {
    const TYPE: Type;
}

/// Another descriptor, which must outlive the one that names it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Link(cudnnBackendDescriptor_t);

/// Memory of the GPU.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Address(pub usize);

macro_rules! attributes {
    ($($value:ty = $name:ident),* $(,)?) => {
        $(
            // SAFETY: the same type in C; `Link` and `Address` are pointers.
            unsafe impl Attribute for $value {
                const TYPE: Type = Type::$name;
            }
        )*
    };
}

attributes! {
    c_char = CUDNN_TYPE_CHAR,
    i64 = CUDNN_TYPE_INT64,
    f32 = CUDNN_TYPE_FLOAT,
    bool = CUDNN_TYPE_BOOLEAN,
    Link = CUDNN_TYPE_BACKEND_DESCRIPTOR,
    Address = CUDNN_TYPE_VOID_PTR,
    cudnnHandle_t = CUDNN_TYPE_HANDLE,
    cudnnDataType_t = CUDNN_TYPE_DATA_TYPE,
    cudnnConvolutionMode_t = CUDNN_TYPE_CONVOLUTION_MODE,
    cudnnPointwiseMode_t = CUDNN_TYPE_POINTWISE_MODE,
    cudnnNanPropagation_t = CUDNN_TYPE_NAN_PROPOGATION,
    cudnnBackendHeurMode_t = CUDNN_TYPE_HEUR_MODE,
}

impl Descriptor {
    pub fn new(kind: Kind) -> Result<Descriptor> {
        let mut descriptor = ptr::null_mut();
        // SAFETY: cuDNN writes the descriptor.
        let status = unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut descriptor) };
        check("cudnnBackendCreateDescriptor", status).map_err(|error| error.context(format_args!("{kind:?}")))?;
        Ok(Descriptor(descriptor))
    }

    pub fn with<A: Attribute>(self, name: Name, values: &[A]) -> Result<Descriptor> {
        // SAFETY: as many elements of the type, which the call copies.
        let status = unsafe {
            sys::cudnnBackendSetAttribute(self.0, name, A::TYPE, values.len() as i64, values.as_ptr().cast())
        };
        check("cudnnBackendSetAttribute", status).map_err(|error| error.context(format_args!("{name:?}")))?;
        Ok(self)
    }

    pub fn finalized(self) -> Result<Descriptor> {
        // SAFETY: the descriptor lives.
        check("cudnnBackendFinalize", unsafe { sys::cudnnBackendFinalize(self.0) })?;
        Ok(self)
    }

    /// For an attribute of another descriptor.
    pub fn link(&self) -> Link {
        Link(self.0)
    }
    pub fn raw(&self) -> cudnnBackendDescriptor_t {
        self.0
    }

    /// An attribute of one integer.
    pub fn integer(&self, name: Name) -> Result<i64> {
        let mut value = 0i64;
        // SAFETY: room for the one element that is asked for.
        unsafe { self.get(name, Type::CUDNN_TYPE_INT64, 1, (&raw mut value).cast()) }?;
        Ok(value)
    }

    /// An attribute of one value of an enumeration, as a number: a newer cuDNN may know some that have no name here. It refuses
    /// more room than for the one.
    pub fn enumerator(&self, name: Name, of: Type) -> Result<i32> {
        let mut value = 0i32;
        // SAFETY: room for the one element that is asked for.
        unsafe { self.get(name, of, 1, (&raw mut value).cast()) }?;
        Ok(value)
    }

    /// An attribute of any number of such values.
    pub fn enumerators(&self, name: Name, of: Type) -> Result<Vec<i32>> {
        let mut values = [0i32; 64];
        // SAFETY: room for as many elements as are asked for.
        let count = unsafe { self.get(name, of, values.len(), values.as_mut_ptr().cast()) }?;
        Ok(values[..count.min(values.len())].to_vec())
    }

    /// How many descriptors an attribute has. Of knobs cuDNN does not tell it without room for them.
    pub fn count(&self, name: Name) -> Result<usize> {
        // SAFETY: without room only the count is written.
        unsafe { self.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, ptr::null_mut()) }
    }

    /// Descriptors that cuDNN makes, at most so many.
    pub fn descriptors(&self, name: Name, kind: Kind, most: usize) -> Result<Vec<Descriptor>> {
        // They are filled in, so they must be there.
        let mut made = (0..most).map(|_| Descriptor::new(kind)).collect::<Result<Vec<_>>>()?;
        let mut links: Vec<Link> = made.iter().map(Descriptor::link).collect();
        // SAFETY: as many descriptors as are asked for.
        let count = unsafe { self.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, most, links.as_mut_ptr().cast()) }?;
        made.truncate(count);
        Ok(made)
    }

    /// How many elements there are, which may be more than were asked for.
    ///
    /// # Safety
    /// There is room for `room` elements of the type.
    unsafe fn get(&self, name: Name, of: Type, room: usize, to: *mut std::ffi::c_void) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the caller's promise.
        let status = unsafe { sys::cudnnBackendGetAttribute(self.0, name, of, room as i64, &mut count, to) };
        check("cudnnBackendGetAttribute", status).map_err(|error| error.context(format_args!("{name:?}")))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. It cannot fail for a descriptor that lives.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

/// A status that is not success becomes an error with the function, the status and what cuDNN says of it.
pub fn check(function: &str, status: cudnnStatus_t) -> Result<()> {
    if status == cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut said = [0 as c_char; 512];
    // SAFETY: cuDNN writes no more than there is room for, and a zero; the name is a constant of its own.
    let (name, said) = unsafe {
        sys::cudnnGetLastErrorString(said.as_mut_ptr(), said.len());
        (CStr::from_ptr(sys::cudnnGetErrorString(status)), CStr::from_ptr(said.as_ptr()))
    };
    let said = said.to_string_lossy();
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let separator = if said.is_empty() { "" } else { ": " };
    Err(Error::device(format!("cuDNN's {function} failed with {}{separator}{said}", name.to_string_lossy())))
}
