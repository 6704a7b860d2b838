//! cuBLASLt's objects, given back when dropped, and its calls, whose status becomes an error.

use super::super::kernels::Element;
use super::super::libraries;
use super::{Epilogue, Product};
use crate::error::{Error, Result};
use cudarc::cublaslt::sys;
use std::ffi::CStr;
use std::ptr;
use std::sync::OnceLock;
use sys::cublasLtMatmulDescAttributes_t as Attribute;
use sys::cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute;
use sys::cublasLtMatrixLayoutAttribute_t as LayoutAttribute;

/// `cublasOperation_t`, which the bindings leave out.
const PLAIN: u32 = 0;
const TRANSPOSED: u32 = 1;

/// Sums of split products: whole in f32, in a fixed order, from the workspace. Products that are not split are always allowed.
pub const REDUCTIONS: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

pub fn check(function: &str, status: sys::cublasStatus_t) -> Result<()> {
    if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: the text is the library's own, and lives as long as it; or null.
    let text = unsafe {
        let text = sys::cublasLtGetStatusString(status);
        if text.is_null() { String::new() } else { format!(", {}", CStr::from_ptr(text).to_string_lossy()) }
    };
    Err(Error::device(format!("{function} failed with {status:?}{text}; CUBLASLT_LOG_LEVEL=1 makes cuBLASLt say why")))
}

/// The library's handle, for the one GPU of this process. It lives as long as the process.
pub struct Library(sys::cublasLtHandle_t);

// SAFETY: "the cuBLASLt library context is thread-safe" (cuBLAS documentation, cublasLtHandle_t).
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    pub fn get() -> Result<&'static Library> {
        static LIBRARY: OnceLock<Result<Library>> = OnceLock::new();
        LIBRARY.get_or_init(Library::new).as_ref().map_err(Clone::clone)
    }

    fn new() -> Result<Library> {
        libraries::cublas_lt()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the library is there, and writes the handle.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&mut handle) })?;
        Ok(Library(handle))
    }

    pub fn handle(&self) -> sys::cublasLtHandle_t {
        self.0
    }
}

/// What is computed: types, transpositions, epilogue.
pub struct Operation(sys::cublasLtMatmulDesc_t);

// SAFETY: no thread owns it; it is used by one at a time.
unsafe impl Send for Operation {}

impl Operation {
    pub fn new(product: &Product) -> Result<Operation> {
        let compute = match product.tf32 {
            true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the library writes the handle.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&mut handle, compute, sys::cudaDataType_t::CUDA_R_32F) };
        check("cublasLtMatmulDescCreate", status)?;
        let operation = Operation(handle);
        let turned = |transposed: bool| if transposed { TRANSPOSED } else { PLAIN };
        // cuBLASLt's A is the right matrix, its B the left one.
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, turned(product.transpose_right))?;
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, turned(product.transpose_left))?;
        operation.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue(product.epilogue) as u32)?;
        Ok(operation)
    }

    pub fn set_bias(&self, address: usize) -> Result<()> {
        self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, address)
    }

    pub fn handle(&self) -> sys::cublasLtMatmulDesc_t {
        self.0
    }

    fn set<T: Copy>(&self, attribute: Attribute, value: T) -> Result<()> {
        // SAFETY: the value has as many bytes as are named, and is copied.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.0, attribute, (&raw const value).cast(), size_of::<T>())
        };
        check("cublasLtMatmulDescSetAttribute", status)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used again.
        unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// How a matrix lies in memory.
pub struct Layout(sys::cublasLtMatrixLayout_t);

// SAFETY: no thread owns it; it is used by one at a time.
unsafe impl Send for Layout {}

impl Layout {
    /// Of a row-major matrix: rows and columns.
    pub fn new(values: Element, (rows, columns): (usize, usize)) -> Result<Layout> {
        let of = match values {
            Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
            Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Element::F16 => sys::cudaDataType_t::CUDA_R_16F,
        };
        let mut handle = ptr::null_mut();
        // SAFETY: the library writes the handle.
        let status =
            unsafe { sys::cublasLtMatrixLayoutCreate(&mut handle, of, columns as u64, rows as u64, columns as i64) };
        check("cublasLtMatrixLayoutCreate", status)?;
        Ok(Layout(handle))
    }

    /// Other rows and columns of the row-major matrix.
    pub fn set(&self, (rows, columns): (usize, usize)) -> Result<()> {
        self.set_attribute(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_ROWS, columns as u64)?;
        self.set_attribute(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_COLS, rows as u64)?;
        self.set_attribute(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_LD, columns as i64)
    }

    pub fn handle(&self) -> sys::cublasLtMatrixLayout_t {
        self.0
    }

    fn set_attribute<T: Copy>(&self, attribute: LayoutAttribute, value: T) -> Result<()> {
        // SAFETY: the value has as many bytes as are named, and is copied.
        let status = unsafe {
            sys::cublasLtMatrixLayoutSetAttribute(self.0, attribute, (&raw const value).cast(), size_of::<T>())
        };
        check("cublasLtMatrixLayoutSetAttribute", status)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used again.
        unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// What is demanded of an algorithm.
pub struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// At most so many bytes of workspace, and matrices at multiples of so many bytes.
    pub fn new(workspace: usize, factors: u32, result: u32) -> Result<Preference> {
        let mut handle = ptr::null_mut();
        // SAFETY: the library writes the handle.
        check("cublasLtMatmulPreferenceCreate", unsafe { sys::cublasLtMatmulPreferenceCreate(&mut handle) })?;
        let preference = Preference(handle);
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace as u64)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, REDUCTIONS)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, factors)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, factors)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, result)?;
        preference.set(PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, result)?;
        Ok(preference)
    }

    pub fn handle(&self) -> sys::cublasLtMatmulPreference_t {
        self.0
    }

    fn set<T: Copy>(&self, attribute: PreferenceAttribute, value: T) -> Result<()> {
        // SAFETY: the value has as many bytes as are named, and is copied.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, (&raw const value).cast(), size_of::<T>())
        };
        check("cublasLtMatmulPreferenceSetAttribute", status)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used again.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn epilogue(epilogue: Epilogue) -> sys::cublasLtEpilogue_t {
    match epilogue {
        Epilogue::None => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        Epilogue::Relu => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU,
        Epilogue::Bias => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
        Epilogue::BiasRelu => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS,
        Epilogue::SumLeft => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BGRADB,
    }
}
