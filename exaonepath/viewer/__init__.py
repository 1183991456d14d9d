"""The slide viewer: a page on the loopback address that shows slides, their patches and embeddings, and searches them.

Needs the extra `viewer` (starlette, uvicorn). The page in `page/` is served as it is: there is no build step, and it
loads nothing from elsewhere.
"""
