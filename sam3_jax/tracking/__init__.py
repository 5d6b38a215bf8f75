"""The tracker as pure functions over a state of fixed size, and what concepts add to it.

:mod:`programs` holds what a session calls, jitted; :mod:`step` says what one frame does,
:mod:`state` what is kept, :mod:`memories` what of it is read. Nothing here knows about files,
videos or identities.
"""
