# Turns a plain llama.cpp tree into the looping one, while CMake configures it:
#
#   cmake -DCMAKE_PROJECT_llama.cpp_INCLUDE=<this file> -DGGUFLOOP_PATCH_ID=<id> ...
#
# CMake includes this file right after project("llama.cpp"), before any target exists. It applies llama-loop.patch (the
# call sites) to the source tree once, and at the end of the top directory adds llama-loop*.cpp (everything else) to the
# target `llama`. The build files of llama.cpp stay untouched, so the patch has nothing to say about CMake.

if(CMAKE_VERSION VERSION_LESS 3.21)
    message(FATAL_ERROR "ggufloop: CMake ${CMAKE_VERSION} is too old, 3.21 is needed")
endif()
if(NOT GGUFLOOP_PATCH_ID)
    message(FATAL_ERROR "ggufloop: GGUFLOOP_PATCH_ID is not set; `ggufloop build` passes it")
endif()

set(GGUFLOOP_PATCHES ${CMAKE_CURRENT_LIST_DIR})

# TRUE when the sources include our header. The exit code of the tool that applies the patch proves nothing: `git apply`
# inside another repository succeeds without changing a file.
function(ggufloop_is_patched out)
    file(GLOB sources ${CMAKE_SOURCE_DIR}/src/*.h ${CMAKE_SOURCE_DIR}/src/*.cpp)
    foreach(source IN LISTS sources)
        file(STRINGS ${source} hits REGEX "#include \"llama-loop.h\"" LIMIT_COUNT 1)
        if(hits)
            set(${out} TRUE PARENT_SCOPE)
            return()
        endif()
    endforeach()
    set(${out} FALSE PARENT_SCOPE)
endfunction()

function(ggufloop_apply_patch)
    set(patch ${GGUFLOOP_PATCHES}/llama-loop.patch)
    set(stamp ${CMAKE_SOURCE_DIR}/.ggufloop-patch)
    file(SHA256 ${patch} wanted)

    ggufloop_is_patched(patched)
    if(patched)
        set(applied "an unknown patch")
        if(EXISTS ${stamp})
            file(READ ${stamp} applied)
        endif()
        if(NOT applied STREQUAL wanted)
            message(FATAL_ERROR "ggufloop: ${CMAKE_SOURCE_DIR} was patched with ${applied}, not with ${patch}; start from a fresh tree")
        endif()
        return()
    endif()

    find_program(GGUFLOOP_GIT git)
    find_program(GGUFLOOP_PATCH patch)
    if(GGUFLOOP_GIT)
        # A repository above the tree, or one named by the environment of a git hook, must not be found.
        get_filename_component(parent ${CMAKE_SOURCE_DIR} DIRECTORY)
        set(command ${CMAKE_COMMAND} -E env --unset=GIT_DIR --unset=GIT_WORK_TREE --unset=GIT_INDEX_FILE --unset=GIT_PREFIX
            GIT_CEILING_DIRECTORIES=${parent} ${GGUFLOOP_GIT} -c core.autocrlf=false apply --whitespace=nowarn ${patch})
    elseif(GGUFLOOP_PATCH)
        set(command ${GGUFLOOP_PATCH} -p1 --batch --forward --fuzz=0 -i ${patch})
    else()
        message(FATAL_ERROR "ggufloop: neither git nor patch is here to apply ${patch}")
    endif()
    execute_process(COMMAND ${command} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
        RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
    ggufloop_is_patched(patched)
    if(NOT result EQUAL 0 OR NOT patched)
        message(FATAL_ERROR "ggufloop: the patch does not apply to this llama.cpp: ${output}")
    endif()
    file(WRITE ${stamp} ${wanted})
    message(STATUS "ggufloop: patch ${GGUFLOOP_PATCH_ID} applied")
endfunction()

function(ggufloop_add_sources)
    file(GLOB sources ${GGUFLOOP_PATCHES}/llama-loop*.cpp)
    target_sources(llama PRIVATE ${sources})
    target_include_directories(llama PRIVATE ${GGUFLOOP_PATCHES})
    # llama.cpp compiles its sources in unity batches, where file-local names of different files meet.
    # Source properties belong to a directory: without TARGET_DIRECTORY they would be set where nothing reads them.
    set_source_files_properties(${sources} TARGET_DIRECTORY llama PROPERTIES
        SKIP_UNITY_BUILD_INCLUSION ON
        COMPILE_DEFINITIONS "GGUFLOOP_PATCH_ID=\"${GGUFLOOP_PATCH_ID}\"")
endfunction()

ggufloop_apply_patch()
cmake_language(DEFER CALL ggufloop_add_sources)
